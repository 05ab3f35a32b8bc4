"""Adapters under the checkpoint's own names: Diffusers, which reads those files, gets the same deltas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_diffusion import Adapter, AdapterMismatchError, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.families.naming import resolve
from lora_diffusion.families.original import dotted, named_for, original
from lora_diffusion.families.skeletons import PUBLISHED, skeleton, skeleton_of
from tests import tiny
from tests.formats import random_adapters


def assert_same_deltas(ours: dict[str, LayerAdapter], expected: dict[str, LayerAdapter]) -> None:
    assert ours.keys() == expected.keys()
    for name, layer in expected.items():
        torch.testing.assert_close(
            random_adapters.delta(ours[name]), random_adapters.delta(layer), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("build", [tiny.flux, tiny.sd3, tiny.sdxl, tiny.sd])
@pytest.mark.parametrize("spelling", ["kohya", "comfy"])
def test_renamed_written_read_and_resolved_it_is_the_same_adapter(build, spelling: str, tmp_path: Path):
    pipe = build()
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    adapter = random_adapters.over(pipe, denoiser, "text_encoder")
    renamed = original(adapter, pipe.components)
    read = load_adapter(save_adapter(renamed, tmp_path / "a.safetensors", format=spelling))
    assert read == renamed
    for component, layers in adapter.layers.items():
        found = resolve(read.layers[component], getattr(pipe, component))
        expected = dict(layers)
        for name in found.layers.keys() - expected.keys():  # fused with layers that have an adapter
            assert not random_adapters.delta(found.layers.pop(name)).any()
        assert_same_deltas(found.layers, expected)


def test_sdxl_goes_to_ldm_names_and_back():
    pipe = tiny.sdxl()
    adapter = random_adapters.over(pipe, "unet")
    attention = {n: layer for n, layer in adapter.layers["unet"].items() if ".attentions." in n}
    adapter = Adapter("x", {"unet": attention})
    renamed = original(adapter, pipe.components)
    assert all(name.startswith(("input_blocks", "middle_block", "output_blocks")) for name in renamed.layers["unet"])
    assert dotted(renamed, pipe.components) == adapter


def test_fused_parts_that_share_down_are_stacked_without_growing():
    pipe = tiny.flux()
    down = torch.randn(2, 32)
    parts = {
        f"transformer_blocks.0.attn.to_{part}": LayerAdapter("lora", {"down": down, "up": torch.randn(32, 2)}, 1.0)
        for part in "qkv"
    }
    layers = original(Adapter("x", {"transformer": parts}), pipe.components).layers["transformer"]
    assert layers["double_blocks.0.img_attn.qkv"].tensors["down"] is down
    assert resolve(layers, pipe.transformer).layers == parts


def test_a_part_alone_leaves_the_others_unchanged():
    pipe = tiny.flux()
    part = {"transformer_blocks.0.attn.to_k": random_adapters.low_rank(pipe.transformer.x_embedder, 2, 1.0)}
    part["transformer_blocks.0.attn.to_k"].tensors["down"] = torch.randn(2, 32)  # type: ignore[index]
    layers = original(Adapter("x", {"transformer": part}), pipe.components).layers["transformer"]
    found = resolve(layers, pipe.transformer).layers
    assert not found["transformer_blocks.0.attn.to_q"].tensors["up"].any()
    assert_same_deltas({n: layer for n, layer in found.items() if n in part}, part)


def test_a_method_that_cannot_be_fused_is_an_error():
    layer = LayerAdapter("ia3", {"weight": torch.ones(32), "on_input": torch.tensor(0)})
    pipe = tiny.flux()
    with pytest.raises(AdapterMismatchError, match="fuses 3 layers"):
        original(Adapter("x", {"transformer": {"transformer_blocks.0.attn.to_q": layer}}), pipe.components)


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_bases_are_built_without_memory(family: str):
    models = skeleton(family)
    assert all(parameter.is_meta for model in models.values() for parameter in model.parameters())


def test_a_pipeline_folder_gives_its_layers(tmp_path: Path):
    pipe = tiny.sd()
    pipe.save_pretrained(tmp_path)
    models = skeleton_of(tmp_path)
    for component in ("unet", "text_encoder"):
        live: nn.Module = getattr(pipe, component)
        assert [name for name, _ in models[component].named_modules()] == [name for name, _ in live.named_modules()]


@pytest.mark.parametrize(
    ("build", "spelling", "begins"),
    [
        (tiny.sd, "kohya", "mid_block"),
        (tiny.sd, "comfy", "middle_block"),
        (tiny.sd, "diffusers", "mid_block"),
        (tiny.sdxl, "kohya", "middle_block"),
        (tiny.sdxl, "comfy", "middle_block"),
        (tiny.sdxl, "peft", "mid_block"),
    ],
)
def test_each_spelling_has_the_names_that_its_tools_know_of_a_unet(build, spelling: str, begins: str):
    pipe = build()
    adapter = random_adapters.over(pipe, "unet", "text_encoder")
    for start in (adapter, original(adapter, pipe.components)):
        names = named_for(start, spelling, pipe.components).layers["unet"]
        assert {name.split(".")[0] for name in names} & {"mid_block", "middle_block"} == {begins}
