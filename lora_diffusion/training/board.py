"""What a run says of itself to TensorBoard, under OUTPUT/tensorboard, where `watch.tensorboard` is set.

    loss/training, loss/heldout, rate, gradient norm     at their steps
    previews/<grid>                                      pictures

A run that goes on from a checkpoint has the points after it hidden and writes them again; all points before a
checkpoint are on the disk before it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from lora_diffusion.errors import ConfigError
from lora_diffusion.training.config import TrainConfig


def check_board(config: TrainConfig) -> None:
    """ConfigError where `watch.tensorboard` is set and there is none."""
    if config.watch.tensorboard:
        _writer()


class Board:
    """Points and pictures of one call of a run that stands at `step`. Says nothing unless it is `on`."""

    def __init__(self, folder: Path, step: int, *, on: bool) -> None:
        self._writer: Any = _writer()(str(folder), purge_step=step + 1) if on else None

    def __enter__(self) -> Board:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """Name -> value after that step."""
        for name, value in values.items() if self._writer else ():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """A picture from disk, by the first word of its name."""
        if self._writer:
            name = path.stem.split("-")[0]
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self._writer.add_image(f"previews/{name}", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Everything so far is on the disk."""
        if self._writer:
            self._writer.flush()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "watch.tensorboard needs tensorboard, which is not installed; pip install 'lora-diffusion[tensorboard]'"
            " or leave it off"
        ) from None
    return SummaryWriter
