"""Layer names that only a base could translate: refused where the tool that reads would leave them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_diffusion import Adapter, load_adapter, save_adapter
from lora_diffusion.adapter import LayerAdapter, same_layer
from lora_diffusion.errors import TargetError
from tests.formats import random_adapters
from tests.test_cli_formats import run


def test_two_namings_of_a_family_not_known_by_heart_are_merged_over_a_base_alone(tmp_path: Path):
    pair = random_adapters.low_rank(torch.nn.Linear(8, 6), 2, 1.0)
    names = {"comfy": "blocks.0.self_attn.q", "kohya": "blocks.0.self_attn.q", "diffusers": "blocks.0.attn1.to_q"}
    files = {
        spelling: save_adapter(
            Adapter(spelling, {"transformer": {name: pair}}), tmp_path / f"{spelling}.safetensors", format=spelling
        )
        for spelling, name in names.items()
    }
    for spelling in ("comfy", "kohya"):
        with pytest.raises(TargetError, match=r"'blocks\.0\.attn1\.to_q' of 'diffusers'.*--base"):
            run("merge", files[spelling], files["diffusers"], "-o", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    alike = run("merge", files["comfy"], files["kohya"], "--format", "comfy", "-o", tmp_path / "out.safetensors")
    assert (alike[0], len(load_adapter(tmp_path / "out.safetensors"))) == (0, 1)


@pytest.mark.parametrize("to", ["comfy", "kohya"])
@pytest.mark.parametrize("layer", ["blocks.0.attn1.to_q", "transformer_blocks.0.attn.to_q"])
def test_names_of_diffusers_are_not_written_where_the_checkpoints_stand(layer: str, to: str, tmp_path: Path):
    pair = random_adapters.low_rank(torch.nn.Linear(8, 6), 2, 1.0)
    file = save_adapter(Adapter("a", {"transformer": {layer: pair}}), tmp_path / "a.safetensors")
    with pytest.raises(TargetError, match=r"are layer names of Diffusers' model.*--base"):
        run("convert", file, tmp_path / "out.safetensors", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    both = {layer: pair, "transformer_blocks.0.img_mlp.net.2": pair}
    qwen = save_adapter(Adapter("b", {"transformer": both}), tmp_path / "b.safetensors")
    assert run("convert", qwen, tmp_path / "out.safetensors", "--to", to)[0] == 0


def attention(width: int, blocks: int, *names: str) -> dict[str, LayerAdapter]:
    pair = LayerAdapter("lora", {"down": torch.ones(1, width), "up": torch.ones(width, 1)}, 1.0)
    return {f"transformer_blocks.{block}.{name}": pair for block in range(blocks) for name in names}


@pytest.mark.parametrize("to", ["comfy", "kohya"])
@pytest.mark.parametrize(
    ("width", "blocks", "names"),
    [
        (2048, 2, ("attn1.to_q", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj")),  # LTX-Video
        (4096, 2, ("attn1.to_k", "attn2.to_v", "audio_attn1.to_q", "video_to_audio_attn.to_v")),  # LTX-2
        (3072, 60, ("attn.to_q", "attn.to_v")),  # Qwen-Image
        (3072, 60, ("attn.to_q", "attn.add_q_proj", "attn.to_add_out")),
    ],
)
def test_attention_that_the_checkpoint_calls_as_diffusers_does_needs_no_base(
    width: int, blocks: int, names: tuple[str, ...], to: str, tmp_path: Path
):
    layers = attention(width, blocks, *names)
    file = save_adapter(Adapter("a", {"transformer": layers}), tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    assert run("convert", file, out, "--to", to)[0] == 0
    expected = {same_layer(name) for name in layers}
    assert {same_layer(name) for name in load_adapter(out).layers["transformer"]} == expected


@pytest.mark.parametrize("to", ["comfy", "kohya"])
@pytest.mark.parametrize(
    ("width", "blocks", "names"),
    [
        (3072, 19, ("attn.to_q", "attn.add_q_proj")),  # FLUX.1, HunyuanVideo or a part of Qwen-Image
        (2048, 30, ("attn.to_q", "attn.add_q_proj")),  # HunyuanVideo 1.5
        (6144, 8, ("attn.to_q", "attn.add_q_proj")),  # FLUX.2
        (1152, 2, ("attn1.to_q", "attn2.to_q")),  # PixArt
        (4096, 2, ("attn1.to_q",)),  # CogView 4
        (2048, 2, ("attn1.to_q", "attn2.to_q", "attn1.norm_q")),
    ],
)
def test_attention_of_which_nothing_tells_the_family_is_not_written_as_stable_diffusion_3(
    width: int, blocks: int, names: tuple[str, ...], to: str, tmp_path: Path
):
    file = save_adapter(Adapter("a", {"transformer": attention(width, blocks, *names)}), tmp_path / "a.safetensors")
    with pytest.raises(TargetError, match=r"are layer names of Diffusers' model.*--base"):
        run("convert", file, tmp_path / "out.safetensors", "--to", to)
