"""LoRAs in the checkpoint's own names: Diffusers' converter of such files puts the same factors on the same layers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, StableCascadeUNet
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lora_diffusion import Adapter, AdapterMismatchError, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.families.names import places
from lora_diffusion.families.naming import resolve
from lora_diffusion.families.original import named_for, original
from lora_diffusion.fitting import fit
from lora_diffusion.methods import new_method
from tests import tiny
from tests.families import test_names
from tests.formats import random_adapters
from tests.formats.test_spellings import (
    KOHYA,
    Tensors,
    assert_lands_like,
    dotted,
    flattened,
    fused,
    opened,
    respelled,
)

CONVERTERS: dict[str, tuple[type[nn.Module], dict[str, Any], Any]] = {
    name: (*test_names.CASES[name][:2], convert)
    for name, convert in {
        "krea2": theirs._convert_non_diffusers_krea2_lora_to_diffusers,
        "cosmos": theirs._convert_non_diffusers_anima_lora_to_diffusers,
        "ltx2": theirs._convert_non_diffusers_ltx2_lora_to_diffusers,
        "ltx": theirs._convert_non_diffusers_ltxv_lora_to_diffusers,
        "hidream": theirs._convert_non_diffusers_hidream_lora_to_diffusers,
    }.items()
}


def factors(model: nn.Module, prefix: str, same: bool) -> Tensors:
    """A pair for every linear layer under its original name."""
    live = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = {place.layers[0]: name for name, place in places(type(model).__name__, live).items()}
    tensors: Tensors = {}
    for layer, module in live.items():
        if layer in names or same:
            stem = f"{prefix}{names.get(layer, layer)}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, module.in_features)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(module.out_features, 2)
    return tensors


@pytest.mark.parametrize("family", CONVERTERS)
def test_it_lands_where_diffusers_puts_it(family: str, tmp_path: Path):
    cls, config, convert = CONVERTERS[family]
    model = test_names.build(cls, **config)
    tensors = factors(model, "diffusion_model.", same=family not in ("krea2", "cosmos"))
    if family == "ltx":  # its converter takes off the prefix and changes no name
        tensors = {key: value for key, value in tensors.items() if not ("patchify" in key or "adaln" in key)}
    assert_lands({"transformer": model}, tensors, convert(dict(tensors)), tmp_path)


def assert_lands(models: dict[str, nn.Module], tensors: Tensors, expected: Tensors, tmp_path: Path) -> None:
    adapter = opened(tensors, tmp_path)
    found = fit(adapter, models)
    assert not found.unplaced
    placed = {f"{component}.{layer}": pair for (component, layer), pair in found.layers.items()}
    assert placed.keys() == {key.rpartition(".lora_")[0] for key in expected}
    for layer, pair in placed.items():
        assert torch.equal(pair.tensors["down"], expected[f"{layer}.lora_A.weight"])
        assert torch.equal(pair.tensors["up"], expected[f"{layer}.lora_B.weight"])
    again = load_adapter(save_adapter(original(adapter, models), tmp_path / "again.safetensors", format="comfy"))
    assert again == adapter


def test_what_stands_beside_the_denoiser_of_anima_is_a_component_of_its_own(tmp_path: Path):
    settings = {"source_dim": 16, "target_dim": 16, "model_dim": 16, "num_layers": 1, "num_attention_heads": 2}
    part = test_names.build(diffusers.AnimaTextConditioner, **settings)
    tensors = factors(part, "diffusion_model.llm_adapter.", same=True)
    expected = theirs._convert_non_diffusers_anima_lora_to_diffusers(dict(tensors))
    assert_lands({"text_conditioner": part}, tensors, expected, tmp_path)
    flat = {
        key.replace("diffusion_model.", "lora_unet_").partition(".lora_")[0].replace(".", "_")
        + (".lora_down.weight" if "lora_A" in key else ".lora_up.weight"): tensor
        for key, tensor in tensors.items()
    }
    assert fit(opened(flat, tmp_path), {"text_conditioner": part}).layers.keys() == {
        ("text_conditioner", key.removeprefix("text_conditioner.").rpartition(".lora_")[0]) for key in expected
    }


def test_what_stands_beside_the_denoiser_of_ltx2_is_a_component_of_its_own(tmp_path: Path):
    settings = {"caption_channels": 16, "text_proj_in_factor": 2}
    for side in ("video", "audio"):
        settings |= {f"{side}_connector_num_attention_heads": 2, f"{side}_connector_attention_head_dim": 8}
    part = test_names.build(LTX2TextConnectors, **settings)
    tensors = factors(part, "text_embedding_projection.", same=False)
    expected = theirs._convert_non_diffusers_ltx2_lora_to_diffusers(dict(tensors), "text_embedding_projection")
    assert len(tensors) == 2
    assert_lands({"connectors": part}, tensors, expected, tmp_path)


def named_by_comfy(name: str) -> str:
    """HunyuanVideo's layers as ComfyUI calls them: what it does to the checkpoint's names when it opens it."""
    name = f"{name}."
    for own, comfys in (
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("_mod.linear.", "_mod.lin."),
        ("_attn_qkv.", "_attn.qkv."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
        ("_attn_q_norm.", "_attn.norm.query_norm."),
        ("_attn_k_norm.", "_attn.norm.key_norm."),
        (".q_norm.", ".norm.query_norm."),
        (".k_norm.", ".norm.key_norm."),
        ("_attn_proj.", "_attn.proj."),
        (".modulation.linear.", ".modulation.lin."),
        ("_in.mlp.2.", "_in.out_layer."),
        ("_in.mlp.0.", "_in.in_layer."),
    ):
        name = name.replace(own, comfys)
    return name.removesuffix(".")


@pytest.mark.parametrize("family", ["hunyuan", "framepack"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_hunyuan_video_has_one_place_under_its_own_name_and_comfys(family: str, prefix: str, tmp_path: Path):
    cls, config, _ = test_names.CASES[family]
    model = test_names.build(cls, **(config | {"num_attention_heads": 2, "attention_head_dim": 16}))
    live = dict(model.named_modules())
    everything = places(cls.__name__, live)
    own = {n: p for n, p in everything.items() if not test_names.COMFY_HUNYUAN.search(n)}
    own = {n: p for n, p in own.items() if not test_names.OTHERS.search(n)}
    assert {place.layers for place in everything.values() if len(place.layers) > 1} <= {p.layers for p in own.values()}
    for name, place in own.items():
        assert everything[named_by_comfy(name)] == place, name
    linear = {n: p for n, p in own.items() if all(isinstance(live[layer], nn.Linear) for layer in p.layers)}
    found: list[Adapter] = []
    for rename in (str, named_by_comfy):
        torch.manual_seed(0)
        layers = {rename(n): fused([live[layer] for layer in place.layers]) for n, place in linear.items()}
        path = (flattened if prefix.endswith("_") else dotted)({"transformer": prefix})
        adapter = opened(respelled(Adapter("x", {"transformer": layers}), path, KOHYA), tmp_path)
        fitted = fit(adapter, {"transformer": model})
        assert not fitted.unplaced
        found.append(Adapter("x", {"transformer": {layer: share for (_, layer), share in fitted.layers.items()}}))
    assert found[0] == found[1]
    assert found[0].layers["transformer"].keys() == {n for n, m in live.items() if isinstance(m, nn.Linear)} - {
        name for name in live if name.startswith("image_projection.")
    }


@pytest.mark.parametrize("diffusers_names", [True, False])
def test_stable_cascade_has_a_prior_and_its_text_encoder(diffusers_names: bool, tmp_path: Path):
    prior = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        switch_level=(False,),
    )
    pipe = SimpleNamespace(prior=prior, text_encoder=tiny.clip(projection=True))
    expected = random_adapters.over(pipe, "text_encoder")
    attention = {n: m for n, m in prior.named_modules() if isinstance(m, nn.Linear) and ".attention." in n}
    expected.layers["prior"] = {n: random_adapters.low_rank(m, 2, 1.0) for n, m in attention.items()}
    assert len(attention) > 8
    prefixes = {"prior": "lora_prior_unet_", "text_encoder": "lora_prior_te_"}

    def named(component: str, name: str) -> str:
        if not diffusers_names:  # as ComfyUI has them
            name = name.replace(".attention.", ".attention.attn.").replace("to_out.0", "out_proj")
        return flattened(prefixes)(component, name)

    adapter = opened(respelled(expected, named, KOHYA), tmp_path)
    assert_lands_like(adapter, expected, pipe)
    path = save_adapter(adapter, tmp_path / "again.safetensors", format="kohya")
    assert all(key.startswith(("lora_prior_unet_", "lora_prior_te_")) for key in load_file(path))
    assert load_adapter(path) == adapter


def test_cogvideox_is_read_and_written_under_diffusers_names_as_diffusers_loads_it(tmp_path: Path):
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
    )
    pipe = SimpleNamespace(transformer=model)
    expected = random_adapters.over(pipe, "transformer")
    path = save_adapter(expected, tmp_path / "b.safetensors", format="diffusers")
    assert_lands_like(load_adapter(path), expected, pipe)
    comfy = {"transformer": "diffusion_model."}
    assert_lands_like(opened(respelled(expected, dotted(comfy), KOHYA), tmp_path), expected, pipe)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    model.load_lora_adapter(load_file(path), prefix="transformer", adapter_name="a", metadata=config)
    random_adapters.assert_loaded_by_diffusers(pipe, expected, "a")


FUSED = "double_blocks.0.img_attn.qkv"


def over_fused(method: str, **settings: Any) -> LayerAdapter:
    adapter = new_method(method, rank=4, alpha=2.5, **settings).fresh(nn.Linear(32, 96))
    for tensor in adapter.tensors.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.0)
    return adapter


@pytest.mark.parametrize("spelling", ["kohya", "comfy"])
@pytest.mark.parametrize(
    "layer",
    [
        *(over_fused(method) for method in ("lora", "biased", "dora", "loha", "lokr", "glora", "ia3", "oft", "full")),
        over_fused("dora", by_input=True),
    ],
    ids=lambda layer: f"{layer.method} {'x'.join(layer.tensors)}",
)
def test_a_layer_that_the_checkpoint_fuses_is_renamed_and_nothing_else(
    layer: LayerAdapter, spelling: str, tmp_path: Path
):
    models = {"transformer": tiny.flux().transformer}
    read = Adapter("a", {"transformer": {FUSED.replace(".", "_"): layer}})
    named = named_for(read, spelling, models)
    assert named.layers == {"transformer": {FUSED: layer}}
    assert load_adapter(save_adapter(named, tmp_path / "a.safetensors", format=spelling)) == read


@pytest.mark.parametrize("method", ["lora", "biased", "dora"])
def test_parts_that_share_their_down_are_fused_again_to_the_bit(method: str):
    model, layer = tiny.flux().transformer, over_fused(method)
    parts = resolve({FUSED: layer}, model).layers
    assert len(parts) == 3
    assert original(Adapter("a", {"transformer": parts}), {"transformer": model}).layers["transformer"] == {
        FUSED: layer
    }


def test_a_layer_that_stands_there_whole_and_in_parts_is_an_error():
    layers = {
        FUSED: over_fused("lora"),
        "transformer_blocks.0.attn.to_q": random_adapters.low_rank(nn.Linear(32, 32), 2, 1),
    }
    with pytest.raises(AdapterMismatchError, match="whole and in parts"):
        original(Adapter("a", {"transformer": layers}), {"transformer": tiny.flux().transformer})
