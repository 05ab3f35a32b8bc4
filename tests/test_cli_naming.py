"""Layer names that only a base could translate: refused where the tool that reads would leave them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_diffusion import Adapter, load_adapter, save_adapter
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
