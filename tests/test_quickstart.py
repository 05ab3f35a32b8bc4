"""The quickstart with few steps over a tiny base: everything it promises is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion import LoRA, attach, save_adapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.quickstart import find_samples, plan, show
from lora_diffusion.training.loop import train
from tests import tiny
from tests.training.pictures import pack

SETTINGS = """
name = "blocks"
base = "base"
[data]
folder = "pack"
heldout = "pack/heldout"
resolution = 32
[adapter]
rank = 2
targets = "attention+conv"
[backbone]
device = "cpu"
[train]
steps = 2
batch = 2
lr = 1e-2
[show]
second = "adapters/other.safetensors"
plain = "plain"
rows = ["thing 0", "thing 1"]
steps = 1
guidance = 2.0
batch = 4
"""


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    pack(folder / "pack", 10)
    pack(folder / "pack" / "heldout", 3)
    pack(folder / "plain", 9, grey=True)
    (folder / "quickstart.toml").write_text(SETTINGS, "utf-8")
    pipe = tiny.sd()
    pipe.save_pretrained(folder / "base")
    (folder / "adapters").mkdir()
    with attach(pipe.unet, LoRA(3), "attention") as attachment:
        for parameter in attachment.parameters():
            parameter.data.normal_(std=0.3)
        save_adapter(attachment.adapter("other"), folder / "adapters" / "other.safetensors")
    return folder


def test_trains_blends_scores_and_draws(samples: Path, tmp_path: Path) -> None:
    chosen = plan(find_samples(samples), tmp_path / "out", None, ["train.steps=3"])
    result = train(chosen.config)
    assert result.steps == 3
    assert result.backbone_unchanged
    assert len(result.losses) == 3
    assert result.adapter is not None
    heard: list[tuple[str, int, int]] = []
    shown = show(chosen, result.adapter, lambda stage, done, total, note="": heard.append((stage, done, total)))
    assert shown.second == "other"
    assert shown.scored == 3
    assert 0 <= shown.score_before <= 1
    assert 0 <= shown.score_after <= 1
    assert {stage for stage, done, total in heard if done == total} == {"drawing the grid", "scoring the style"}
    with Image.open(shown.grid) as grid:
        pixels = np.asarray(grid)
    assert pixels.shape[1] > 5 * 128  # base, style twice, second, both
    assert pixels.std() > 10


def test_another_base_leaves_the_second_adapter_out(samples: Path, tmp_path: Path) -> None:
    tiny.sd(block_out_channels=(64, 64)).save_pretrained(tmp_path / "other base")
    chosen = plan(samples, tmp_path / "out", str(tmp_path / "other base"), [])
    result = train(chosen.config)
    assert result.adapter is not None
    shown = show(chosen, result.adapter, lambda *args: None)
    assert shown.grid.is_file()


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no samples in"):
        find_samples(tmp_path)
