"""Every spelling of every family: what is written is read again to the bit, and the peer gets the same deltas.

The peer is Diffusers' own loader where it reads the spelling, else its checkpoint converter: the deltas of the file,
computed from its tensors by kohya's rule alpha / rank · up · down, go through it like weights of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterFileError, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.adapter import flat
from lora_diffusion.families import FAMILIES
from lora_diffusion.families.naming import resolve
from lora_diffusion.families.original import original
from lora_diffusion.formats import FORMATS
from lora_diffusion.formats.peft_folder import save_peft_folder
from lora_diffusion.layers import is_convolution, is_linear, kernel_shape
from lora_diffusion.methods import METHODS, Method, written
from tests import tiny
from tests import tiny_families as more
from tests.families import test_names
from tests.formats import random_adapters

BUILD: dict[str, Callable[[], Any]] = {
    "sd": tiny.sd,
    "sd, 2.x": more.sd2_v,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "flux2": more.flux2,
    "z-image": more.z_image,
    "qwen-image": more.qwen_image,
    "chroma": more.chroma,
    "lumina2": more.lumina2,
    "sana": more.sana,
    "pixart-sigma": more.pixart,
}
WRITERS = [name for name in FORMATS if FORMATS[name].writes and name != "embedding"]
ORIGINAL = ("kohya", "comfy")  # these also under the checkpoint's own names


def denoiser_of(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def over_all(pipe: Any) -> Adapter:
    """Every layer that can take a pair, of the denoiser and all text encoders, each with its own rank and alpha."""
    texts = [name for name in pipe.components if name.startswith("text_encoder")]
    adapter = random_adapters.over(pipe, denoiser_of(pipe), *texts)
    for component, layers in adapter.layers.items():
        live = dict(getattr(pipe, component).named_modules())
        adapter.layers[component] = {
            name: layer for name, layer in layers.items() if is_linear(live[name]) or is_convolution(live[name])
        }
    return adapter


def test_every_family_is_here():
    assert {name.partition(",")[0] for name in BUILD} == set(FAMILIES)


@pytest.mark.parametrize("spelling", WRITERS)
@pytest.mark.parametrize("family", BUILD)
def test_written_and_read_again_it_is_the_same_to_the_bit(family: str, spelling: str, tmp_path: Path):
    pipe = BUILD[family]()
    adapter = over_all(pipe)
    read = load_adapter(save_adapter(adapter, tmp_path / "a.safetensors", format=spelling))
    assert (read.spelling, read.unused) == (spelling, {})
    assert read == adapter
    assert read.content_hash == adapter.content_hash
    for component, layers in adapter.layers.items():
        assert resolve(read.layers[component], getattr(pipe, component)).layers == layers
    if spelling in ORIGINAL:
        renamed = original(adapter, pipe.components)
        again = load_adapter(save_adapter(renamed, tmp_path / "b.safetensors", format=spelling))
        assert again == renamed
        for component, layers in adapter.layers.items():
            found = resolve(again.layers[component], getattr(pipe, component))
            assert not found.unmatched
            assert_same_deltas(found.layers, layers)


@pytest.mark.parametrize("family", BUILD)
def test_a_peft_folder_of_every_family_is_read_again_to_the_bit(family: str, tmp_path: Path):
    pipe = BUILD[family]()
    denoiser = denoiser_of(pipe)
    adapter = Adapter("a", {denoiser: over_all(pipe).layers[denoiser]})
    assert load_adapter(save_peft_folder(adapter, tmp_path / "folder")) == adapter


def assert_same_deltas(ours: dict[str, LayerAdapter], expected: dict[str, LayerAdapter]) -> None:
    assert ours.keys() == expected.keys()
    for name, layer in expected.items():
        delta = random_adapters.delta(layer)
        torch.testing.assert_close(random_adapters.delta(ours[name]), delta, rtol=1e-6, atol=1e-6)


def settings(method: type[Method]) -> list[Method]:
    """A method as it is, and with each of its switches on."""
    known = {field.name for field in fields(method)}  # type: ignore[arg-type]
    plain: dict[str, Any] = {"rank": 4} if "rank" in known else {}
    switches = [field.name for field in fields(method) if field.type == "bool"]  # type: ignore[arg-type]
    return [method(**plain), *(method(**plain, **{switch: True}) for switch in switches)]


LAYERS: dict[str, nn.Module] = {
    "mid_block.attentions.0.proj_in": nn.Linear(16, 24),
    "mid_block.resnets.0.conv1": nn.Conv2d(8, 12, 3),
    "mid_block.attentions.0.norm": nn.LayerNorm(16),
    "mid_block.attentions.0.transformer_blocks.0.attn1": Attention(16, heads=2, dim_head=8),
}
#: what other tools than LyCORIS' and ComfyUI's can say
SAYS = {"diffusers": {"lora", "dora"}, "peft": {"lora", "dora", "vera"}}


@pytest.mark.parametrize("spelling", [*WRITERS, "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_read_again_to_the_bit_in_every_spelling_that_can_say_it(
    method: str, spelling: str, tmp_path: Path
):
    for number, setting in enumerate(settings(METHODS[method])):
        layers = {name: setting.fresh(layer) for name, layer in LAYERS.items() if setting.supports(layer)}
        for layer in layers.values():
            for tensor in layer.tensors.values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
        layers = written(layers)  # AdaLoRA and T-LoRA are plain LoRA in files
        (said,) = {layer.method for layer in layers.values()}
        adapter = Adapter("a", {"unet": layers})
        path = tmp_path / f"{number}.safetensors"
        write = save_peft_folder if spelling == "peft" else lambda a, p: save_adapter(a, p, format=spelling)
        by_input = any(layer.tensors.get("magnitude", torch.ones(1)).ndim > 1 for layer in layers.values())
        if said not in SAYS.get(spelling, METHODS) or (by_input and spelling in SAYS):
            with pytest.raises(AdapterFileError):
                write(adapter, path)
            assert not path.exists()
            continue
        read = load_adapter(write(adapter, path))
        assert not read.unused
        assert read == adapter, setting


#: family, spelling, and whether under the checkpoint's own names: what Diffusers' loader reads whole
LOADED = {
    **{(family, "diffusers"): False for family in BUILD if family != "pixart-sigma"},  # it has no loader there
    ("sd", "kohya"): False,
    ("sd, 2.x", "kohya"): False,
    ("sdxl", "kohya"): True,
    ("z-image", "kohya"): False,
    ("z-image", "comfy"): False,
    ("qwen-image", "kohya"): False,
    ("qwen-image", "comfy"): False,
}


@pytest.mark.parametrize(("family", "spelling"), LOADED)
def test_diffusers_loader_gives_every_layer_the_delta_we_wrote(family: str, spelling: str, tmp_path: Path):
    pipe = BUILD[family]()
    adapter = Adapter("a", {denoiser_of(pipe): over_all(pipe).layers[denoiser_of(pipe)]})
    if spelling != "diffusers":  # Diffusers 0.42 mixes up alphas that differ
        for layers in adapter.layers.values():
            layers |= {name: replace(layer, alpha=3.0) for name, layer in layers.items()}
    named = original(adapter, pipe.components) if LOADED[family, spelling] else adapter
    pipe.load_lora_weights(str(save_adapter(named, tmp_path / "a.safetensors", format=spelling)), adapter_name="a")
    random_adapters.assert_loaded_by_diffusers(pipe, adapter, "a")


def deltas_in(path: Path, spelling: str) -> dict[str, Tensor]:
    """Name before the suffix -> (up, scaled, and down), straight from the file by kohya's rule."""
    down, up = "lora_down", "lora_up"
    tensors = load_file(path)
    stems = [key.removesuffix(f".{down}.weight") for key in tensors if key.endswith(f".{down}.weight")]
    assert len(tensors) == 3 * len(stems)
    return {
        stem.removeprefix("lora_unet_").removeprefix("diffusion_model."): (
            tensors[f"{stem}.{up}.weight"] * (tensors[f"{stem}.alpha"] / len(tensors[f"{stem}.{down}.weight"])),
            tensors[f"{stem}.{down}.weight"],
        )
        for stem in stems
    }


def seen(up: Tensor, down: Tensor) -> Tensor:
    """up · down · v for two fixed vectors v: (out, 2), as much of a delta as a converter needs that moves rows."""
    rows = down.flatten(1)
    v = torch.randn(rows.shape[1], 2, generator=torch.Generator().manual_seed(rows.shape[1]))
    return up.flatten(1).double() @ (rows.double() @ v.double())


def in_checkpoint(family: str) -> tuple[nn.Module, Adapter]:
    """A model that Diffusers' converter knows (on the meta device), and an adapter over its linear layers."""
    cls, config, _ = test_names.CASES[family]
    model = test_names.build(cls, **config)
    same, odd = test_names.SAME.get(family, "$"), test_names.places(cls.__name__, dict(model.named_modules()))
    named = {layer for place in odd.values() for layer in place.layers}
    layers: dict[str, LayerAdapter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name in named or test_names.re.fullmatch(same, name)):
            rank = 1 + len(layers) % 3
            down, up = torch.randn(rank, *kernel_shape(module)), torch.randn(module.out_features, rank)
            layers[name] = LayerAdapter("lora", {"down": down, "up": up}, 0.5 + len(layers) % 4)
    return model, Adapter("a", {"transformer": layers})


@pytest.mark.parametrize("spelling", ORIGINAL)
@pytest.mark.parametrize("family", test_names.CASES)
def test_diffusers_checkpoint_converter_gives_every_layer_the_delta_we_wrote(
    family: str, spelling: str, tmp_path: Path
):
    model, adapter = in_checkpoint(family)
    renamed = original(adapter, {"transformer": model})
    path = save_adapter(renamed, tmp_path / "a.safetensors", format=spelling)
    dotted = {flat(name): name for name in renamed.layers["transformer"]}
    assert len(dotted) == len(renamed)
    checkpoint = {f"{dotted[flat(stem)]}.weight": seen(*pair) for stem, pair in deltas_in(path, spelling).items()}
    converted = test_names.CASES[family][2](test_names.Checkpoint(checkpoint))
    ours = resolve(load_adapter(path).layers["transformer"], model).layers
    for name, layer in adapter.layers["transformer"].items():
        expected = seen_of(layer)
        torch.testing.assert_close(converted[f"{name}.weight"], expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(seen_of(ours[name]), expected, rtol=1e-4, atol=1e-3)


def seen_of(layer: LayerAdapter) -> Tensor:
    down, up = layer.tensors["down"], layer.tensors["up"]
    assert layer.alpha is not None
    return seen(up * (layer.alpha / len(down)), down)
