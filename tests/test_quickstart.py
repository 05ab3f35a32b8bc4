"""The quickstart with few steps over a tiny base: everything it promises is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion import AdapterStack, LoRA, attach, quickstart, save_adapter
from lora_diffusion.data.examples import find_examples
from lora_diffusion.data.pictures import open_picture
from lora_diffusion.errors import ConfigError
from lora_diffusion.generating import reconstructed
from lora_diffusion.pipelines import Opened, load_for_drawing
from lora_diffusion.quickstart import Plan, find_samples, plan, show
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
    assert {stage for stage, done, total in heard if done == total} == {"drawing the grid", "scoring the style"}
    with Image.open(shown.grid) as grid:
        pixels = np.asarray(grid)
    assert pixels.shape[1] > 5 * 128  # base, style twice, second, both
    assert pixels.std() > 10


def test_the_style_score_is_0_for_the_plain_look_and_1_for_the_packs(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan(samples, tmp_path / "out", None, [])
    opened = load_for_drawing(chosen.config.base, None, "cpu")
    looks = iter((samples / "plain", samples / "pack"))  # what is "drawn" without and with the style

    def drawn(plan: Plan, opened: Opened, prompts: Sequence[str]) -> list[Image.Image]:
        return reconstructed(opened.pipe, [open_picture(e.picture) for e in find_examples(next(looks))], (32, 32))

    monkeypatch.setattr(quickstart, "_draw", drawn)
    with AdapterStack(opened.pipe) as stack:
        style = stack.add(samples / "adapters" / "other.safetensors")
        before, after, scored = quickstart._score(chosen, opened, stack, style, lambda *args: None)
    assert before < 0.2
    assert after > 0.8
    assert scored == 3


def test_another_base_leaves_the_second_adapter_out(samples: Path, tmp_path: Path) -> None:
    tiny.sd(block_out_channels=(32, 96)).save_pretrained(tmp_path / "other base")
    chosen = plan(samples, tmp_path / "out", str(tmp_path / "other base"), [])
    result = train(chosen.config)
    assert result.adapter is not None
    shown = show(chosen, result.adapter, lambda *args: None)
    assert shown.second is None
    with Image.open(shown.grid) as grid:
        assert grid.width < 5 * 128  # base and style twice


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no samples in"):
        find_samples(tmp_path)
