"""What a caller hears while a run goes on, and gets when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.errors import LoraDiffusionError
from lora_diffusion.quantize import QuantizationReport


class DivergedError(LoraDiffusionError, ArithmeticError):
    """The loss or the gradients are no numbers any more."""


@dataclass(frozen=True)
class Progress:
    """What a caller is told after each step. `stage` is "prepare", "measure" or "train"."""

    stage: str
    done: int
    total: int
    loss: float = math.nan


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class TrainResult:
    """What came out. Losses are mean squared errors at fixed noise and times over the held-out pictures."""

    adapter: Path | None  # None when interrupted
    steps: int
    seconds: float
    losses: list[float] = field(repr=False)
    heldout_base: float = math.nan
    heldout_adapter: float = math.nan
    backbone_unchanged: bool = True
    parameters: int = 0
    report: QuantizationReport | None = field(default=None, repr=False)

    @property
    def interrupted(self) -> bool:
        """Whether it stopped early; the same call goes on."""
        return self.adapter is None
