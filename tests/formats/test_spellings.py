"""Every spelling of the catalogue: the same tensors under another tool's names land on the same layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterFileError, AdapterMismatchError, LayerAdapter, load_adapter
from lora_diffusion.families.names import places
from lora_diffusion.families.naming import resolve
from tests import tiny
from tests.formats import random_adapters

Tensors = dict[str, Tensor]
Rename = Callable[[str, str], str]  # component, layer -> what stands before the suffix

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


def respelled(adapter: Adapter, path: Rename, suffixes: tuple[str, str] = PEFT, alpha: str | None = "alpha") -> Tensors:
    """An adapter's tensors under another tool's names."""
    tensors: Tensors = {}
    for component, name, layer in adapter:
        stem = path(component, name)
        tensors |= {f"{stem}.{suffixes[0]}": layer.tensors["down"], f"{stem}.{suffixes[1]}": layer.tensors["up"]}
        if alpha:
            tensors[f"{stem}.{alpha}"] = torch.tensor(layer.alpha, dtype=torch.float64)
    return tensors


def opened(tensors: Tensors, tmp_path: Path) -> Adapter:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    return load_adapter(tmp_path / "a.safetensors")


def assert_lands_like(adapter: Adapter, expected: Adapter, pipe: object) -> None:
    assert {component for component, layers in adapter.layers.items() if layers} == expected.layers.keys()
    for component, layers in expected.layers.items():
        found = resolve(adapter.layers[component], getattr(pipe, component))
        assert not found.unmatched
        assert found.layers == layers


def flattened(prefixes: dict[str, str]) -> Rename:
    return lambda component, name: prefixes[component] + name.replace(".", "_")


def dotted(prefixes: dict[str, str]) -> Rename:
    return lambda component, name: prefixes[component] + name


SD = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
SPELLINGS: dict[str, tuple[Rename, tuple[str, str]]] = {
    "kohya": (flattened(SD), KOHYA),
    "kohya with te1": (flattened(SD | {"text_encoder": "lora_te1_text_model_"}), KOHYA),
    "double underscore": (flattened(SD | {"unet": "lora_unet__"}), KOHYA),
    "PEFT": (dotted({"unet": "unet.", "text_encoder": "text_encoder."}), PEFT),
    "PEFT with text_model": (dotted({"unet": "unet.", "text_encoder": "text_encoder.text_model."}), PEFT),
    "PEFT with the adapter's name": (
        dotted({"unet": "unet.", "text_encoder": "text_encoder."}),
        ("lora_A.default_0.weight", "lora_B.default_0.weight"),
    ),
    "PEFT without .weight": (dotted({"unet": "unet.", "text_encoder": "text_encoder."}), ("lora_A", "lora_B")),
    "PEFT of the whole model": (
        dotted({"unet": "unet.base_model.model.", "text_encoder": "text_encoder."}),
        PEFT,
    ),
    "Diffusers 0.22": (
        dotted({"unet": "unet.", "text_encoder": "text_encoder.text_model."}),
        ("lora.down.weight", "lora.up.weight"),
    ),
    "lora_linear_layer": (
        dotted({"unet": "unet.", "text_encoder": "text_encoder.text_model."}),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ),
    "ComfyUI": (
        dotted({"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer.text_model."}),
        PEFT,
    ),
    "bare": (dotted({"unet": "", "text_encoder": "text_model."}), PEFT),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_stable_diffusion_in_every_spelling(name: str, tmp_path: Path):
    pipe = tiny.sd()
    expected = random_adapters.over(pipe, "unet", "text_encoder")
    path, suffixes = SPELLINGS[name]
    assert_lands_like(opened(respelled(expected, path, suffixes), tmp_path), expected, pipe)


def test_a_mixed_file_is_read_whole(tmp_path: Path):
    pipe = tiny.sd()
    expected = random_adapters.over(pipe, "unet", "text_encoder")
    halves: list[Adapter] = []
    for rest in (0, 1):
        layers = {c: dict(list(of.items())[rest::2]) for c, of in expected.layers.items()}
        halves.append(Adapter("half", layers))
    tensors = respelled(halves[0], flattened(SD), KOHYA)
    tensors |= respelled(halves[1], dotted({"unet": "unet.", "text_encoder": "text_encoder."}))
    read = opened(tensors, tmp_path)
    for component, layers in expected.layers.items():
        assert resolve(read.layers[component], getattr(pipe, component)).layers == layers


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "model.diffusion_model."])
def test_ldm_block_names_land_on_the_same_layers(build, prefix: str, tmp_path: Path):
    pipe = build()
    expected = random_adapters.over(pipe, "unet")
    live = [name for name, _ in pipe.unet.named_modules()]
    original = {place.layers[0]: name for name, place in places("UNet2DConditionModel", live).items()}
    flat = prefix.endswith("_")
    path = lambda _, name: prefix + (original[name].replace(".", "_") if flat else original[name])  # noqa: E731
    assert_lands_like(opened(respelled(expected, path, KOHYA if flat else PEFT), tmp_path), expected, pipe)


def attention_only(adapter: Adapter) -> Adapter:
    keep = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    layers = {c: {n: layer for n, layer in of.items() if n.endswith(keep)} for c, of in adapter.layers.items()}
    return Adapter(adapter.name, layers)


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_attention_processors_of_old_diffusers(prefix: str, tmp_path: Path):
    pipe = tiny.sd()
    expected = attention_only(random_adapters.over(pipe, "unet", "text_encoder"))
    for of in expected.layers.values():
        for name, layer in of.items():  # those files have no alpha
            of[name] = LayerAdapter("lora", layer.tensors, float(layer.tensors["down"].shape[0]))

    def path(component: str, name: str) -> str:
        if component == "text_encoder":
            return f"text_encoder.text_model.{name}"
        attention, _, projection = name.partition(".to_")
        return f"{prefix}{attention}.processor.to_{projection.removesuffix('.0')}_lora"

    unet = Adapter("x", {"unet": expected.layers["unet"]})
    text = Adapter("x", {"text_encoder": expected.layers["text_encoder"]})
    tensors = respelled(unet, path, ("down.weight", "up.weight"), None)
    tensors |= respelled(text, path, ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), None)
    assert_lands_like(opened(tensors, tmp_path), expected, pipe)


def test_a_diffusers_name_flattened_suffix_and_all(tmp_path: Path):
    pipe = tiny.sd()
    expected = random_adapters.over(pipe, "unet")
    for name, layer in expected.layers["unet"].items():
        expected.layers["unet"][name] = LayerAdapter("lora", layer.tensors, float(layer.tensors["down"].shape[0]))
    tensors = respelled(expected, dotted({"unet": "unet."}), ("lora_down", "lora_up"), None)
    tensors = {f"lora_unet_{key.replace('.', '_')}.weight": tensor for key, tensor in tensors.items()}
    assert_lands_like(opened(tensors, tmp_path), expected, pipe)


def fused(layers: list[nn.Module], rank: int = 2) -> LayerAdapter:
    rows = sum(layer.out_features for layer in layers)
    tensors = {"down": torch.randn(rank, layers[0].in_features), "up": torch.randn(rows, rank)}
    return LayerAdapter("lora", tensors, 3.0, "tensor")


@pytest.mark.parametrize("build", [tiny.flux, tiny.sd3])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", ""])
def test_fused_layers_are_divided_and_final_modulations_swapped(build, prefix: str, tmp_path: Path):
    model = build().transformer
    live = dict(model.named_modules())
    table = {
        name: place
        for name, place in places(type(model).__name__, live).items()
        if all(isinstance(live[layer], nn.Linear) for layer in place.layers) and ".linear1.qkv" not in name
    }
    originals = {name: place for name, place in table.items() if name.rpartition(".")[0] not in table}
    adapter = Adapter("x", {"transformer": {n: fused([live[x] for x in p.layers]) for n, p in originals.items()}})
    assert any(place.swapped for place in originals.values())
    assert any(len(place.layers) > 1 for place in originals.values())
    name = flattened({"transformer": prefix}) if prefix.endswith("_") else dotted({"transformer": prefix})
    found = resolve(opened(respelled(adapter, name, KOHYA), tmp_path).layers["transformer"], model)
    assert not found.unmatched
    for original, place in originals.items():
        whole = random_adapters.delta(adapter.layers["transformer"][original])
        parts = torch.cat([random_adapters.delta(found.layers[layer]) for layer in place.layers])
        assert torch.equal(parts, whole.roll(len(whole) // 2, 0) if place.swapped else whole), original


def test_the_parts_of_a_fused_layer_that_onetrainer_numbers(tmp_path: Path):
    model = tiny.flux().transformer
    qkv = "double_blocks.0.img_attn.qkv"
    names = {f"{qkv}.{number}": f"transformer_blocks.0.attn.to_{part}" for number, part in enumerate("qkv")}
    adapter = Adapter("x", {"transformer": {n: fused([model.get_submodule(live)]) for n, live in names.items()}})
    read = opened(respelled(adapter, dotted({"transformer": "transformer."}), KOHYA), tmp_path)
    assert resolve(read.layers["transformer"], model).layers.keys() == set(names.values())


def test_xlabs_trains_the_image_and_the_text_stream_of_double_blocks_and_qkv_of_single_ones(tmp_path: Path):
    model = tiny.flux().transformer
    tensors = {}
    for stem, rows, width in (
        ("double_blocks.0.processor.qkv_lora1", 96, 32),
        ("double_blocks.0.processor.qkv_lora2", 96, 32),
        ("double_blocks.0.processor.proj_lora2", 32, 32),
        ("single_blocks.1.processor.qkv_lora", 96, 32),
        ("single_blocks.1.processor.proj_lora", 32, 160),
    ):
        tensors |= {f"{stem}.down.weight": torch.randn(2, width), f"{stem}.up.weight": torch.randn(rows, 2)}
    read = opened(tensors, tmp_path)
    assert read.spelling == "xlabs"
    found = resolve(read.layers["transformer"], model)
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.1"
    assert found.layers.keys() == {
        *(f"{double}.to_{part}" for part in "qkv"),
        *(f"{double}.add_{part}_proj" for part in "qkv"),
        f"{double}.to_add_out",
        *(f"{single}.attn.to_{part}" for part in "qkv"),
        f"{single}.proj_out",
    }


@pytest.mark.parametrize("prefix", ["lora_te3_", "lora_te2_", "text_encoders.t5xxl.transformer."])
def test_t5_of_flux_is_its_second_text_encoder(prefix: str, tmp_path: Path):
    pipe = tiny.flux()
    expected = random_adapters.over(pipe, "transformer", "text_encoder_2")
    name = flattened if prefix.endswith("_") else dotted
    tensors = respelled(expected, name({"transformer": "lora_transformer_", "text_encoder_2": prefix}), KOHYA)
    if not prefix.endswith("_"):
        tensors = {key.replace("lora_transformer_", "transformer."): tensor for key, tensor in tensors.items()}
    assert_lands_like(opened(tensors, tmp_path), expected, pipe)


@pytest.mark.parametrize("order", ["new", "old"])
def test_cloneofsimo_numbers_find_their_layers_in_both_orders(order: str, tmp_path: Path):
    pipe = tiny.sd()
    chosen = attention_only(random_adapters.over(pipe, "unet")).layers["unet"]
    gate = {n: m for n, m in pipe.unet.named_modules() if n.endswith("ff.net.0.proj")}
    chosen |= {name: random_adapters.low_rank(layer, 2, 2.0) for name, layer in gate.items()}
    blocks: dict[str, list[str]] = {}
    for name in chosen:
        blocks.setdefault(name.split(".transformer_blocks")[0], []).append(name)
    rank = {"old": ("attn1", "ff", "attn2"), "new": ("attn1", "attn2", "ff")}[order]
    live = list(dict.fromkeys(n.split(".transformer_blocks")[0] for n, _ in pipe.unet.named_modules()))
    names = [name for block in live for kind in rank for name in blocks.get(block, []) if f".{kind}." in name]
    tensors: Tensors = {}
    expected: dict[str, LayerAdapter] = {}
    for number, name in enumerate(names):
        pair = {part: tensor.clone() for part, tensor in chosen[name].tensors.items()}
        tensors |= {f"unet:{number}:{part}": tensor for part, tensor in pair.items()}
        expected[name] = LayerAdapter("lora", pair, float(pair["down"].shape[0]))
    tensors["<s1>"] = torch.randn(32)
    read = opened(tensors, tmp_path)
    assert resolve(read.layers["unet"], pipe.unet).layers == expected
    assert read.embeddings["<s1>"]["text_encoder"].shape == (1, 32)


def test_numbered_layers_of_another_model_are_an_error():
    layer = LayerAdapter("lora", {"down": torch.ones(1, 3), "up": torch.ones(3, 1)}, 1.0)
    with pytest.raises(AdapterMismatchError, match="numbers 1 layers"):
        resolve({"#0": layer}, tiny.sd().unet)


def test_a_peft_folder_has_its_scale_beside_it(tmp_path: Path):
    pipe = tiny.sd()
    expected = random_adapters.over(pipe, "unet")
    for name, layer in expected.layers["unet"].items():
        down, up = layer.tensors["down"][:1], layer.tensors["up"][:, :1]
        pair = {"down": down.repeat_interleave(4, 0), "up": up.repeat_interleave(4, 1)}
        expected.layers["unet"][name] = LayerAdapter("lora", pair, 16.0)
    tensors = respelled(expected, dotted({"unet": "base_model.model."}), PEFT, None)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_lands_like(load_adapter(path), expected, pipe)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "OFT"}))
    with pytest.raises(AdapterFileError, match="'OFT'"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("base_model.model.x.vera_lambda_d", "widest layer"),
        ("base_model.vera_A", "VeRA"),
        ("lllite_unet_x.down", "LLLite"),
        ("lora_controlnet", "Control-LoRA"),
    ],
)
def test_what_is_known_and_no_adapter_is_refused_by_its_name(key: str, what: str, tmp_path: Path):
    with pytest.raises(AdapterFileError, match=what):
        opened({key: torch.ones(2)}, tmp_path)
