"""A small pack on disk and a configuration for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_diffusion import TrainConfig, TrainResult, train
from lora_diffusion.training.results import Progress
from tests import tiny


def pack(folder: Path, count: int = 6, *, grey: bool = False) -> Path:
    """`count` captioned 32x32 pictures of blocks, in colours or greys."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        blocks = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks).convert("L" if grey else "RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing {i}", "utf-8")
    return folder


def settings(root: Path, base: str = "sd", **train: Any) -> dict[str, Any]:
    """Settings of a short run over a tiny base, both made below `root` when they are not there."""
    if not (root / "base").exists():
        getattr(tiny, base)().save_pretrained(root / "base")
        pack(root / "pack")
    return {
        "name": "blocks",
        "base": str(root / "base"),
        "output": str(root / "out"),
        "data": {"folder": str(root / "pack"), "heldout": 0.34, "resolution": 32},
        "adapter": {"rank": 4, "targets": "attention+ff"},
        "backbone": {"device": "cpu"},
        "train": {"steps": 6, "batch": 2, "lr": 5e-3, "warmup": 1, "checkpoint_every": 2, **train},
    }


def config(root: Path, base: str = "sd", **train: Any) -> TrainConfig:
    """The same as a TrainConfig."""
    return TrainConfig.parse(settings(root, base, **train))


def cut_off(config: TrainConfig, at: int) -> None:
    """Train until something is raised in the middle of a step's report, which no loop expects."""

    def cut(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, cut)


def interrupted(config: TrainConfig, after: int = 1) -> TrainResult:
    """Train until Ctrl-C comes after so many steps; what a run gives that has stopped early."""

    def interrupt(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == after:
            os.kill(os.getpid(), signal.SIGINT)

    result = train(config, interrupt)
    assert result.interrupted
    return result
