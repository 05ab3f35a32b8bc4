"""What a caller hears while a run goes on, and gets when it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_diffusion.drafts import whole_file
from lora_diffusion.errors import ConfigError, LoraDiffusionError
from lora_diffusion.quantize import QuantizationReport

RESULT = "result.json"


class DivergedError(LoraDiffusionError, ArithmeticError):
    """The loss or the gradients are no numbers any more."""


@dataclass(frozen=True)
class Progress:
    """What a caller is told after each step. `stage` is "prepare", "measure", "train" or "note", which has `said`."""

    stage: str
    done: int
    total: int
    loss: float = math.nan
    rate: float = math.nan
    """Learning rate; what Prodigy finds is in it."""
    said: str = ""
    """Something to know that has no number: what was left out, how a resumed run differs."""


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
    bands_base: list[float] = field(default_factory=list[float], repr=False)
    """Held-out losses by time, clean to noisy."""
    bands_adapter: list[float] = field(default_factory=list[float], repr=False)
    measured: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]], repr=False)
    """Step and held-out loss."""
    weights: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]], repr=False)
    """Component -> layer -> ‖W‖ of the frozen weights that were adapted."""
    previews: list[Path] = field(default_factory=list[Path], repr=False)  # in the order they were drawn
    memory: int = 0  # bytes at the peak: of the GPU where there is one, else of this process
    precision: str = ""  # of the backbone
    left_out: list[str] = field(default_factory=list[str], repr=False)
    """Pictures, records and masks that `data.skip_bad` went on without, each with its fault."""

    @property
    def heldout(self) -> str:
        """Held-out loss of base and adapter, to be read."""
        if math.isnan(self.heldout_base) or math.isnan(self.heldout_adapter):
            return "not measured: nothing is held out"
        return f"{self.heldout_base:.4f} → {self.heldout_adapter:.4f}"

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss where the held-out loss was lowest, of those that were measured on the way."""
        return min(self.measured, key=lambda one: one[1], default=None)

    @property
    def interrupted(self) -> bool:
        """Whether it stopped early; the same call goes on."""
        return self.adapter is None

    def write(self, folder: Path) -> None:
        """Keep what was found as OUTPUT/result.json, whole or not at all. What each layer became is not in it."""
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "report"}
        with whole_file(folder / RESULT) as draft:
            draft.write_text(json.dumps(kept, default=str), "utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainResult:
        """What a finished run in `folder` found. ConfigError where there is none."""
        path = folder / RESULT
        try:
            kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
            kept["adapter"] = folder / Path(kept["adapter"]).name
            kept["previews"] = [Path(path) for path in kept["previews"]]
            kept["measured"] = [(int(step), float(loss)) for step, loss in kept["measured"]]
            return cls(**kept)
        except FileNotFoundError:
            raise ConfigError(f"there is no finished run in {folder}: no {RESULT} in it") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not whole ({type(error).__name__}: {error}); train again to mend it"
            ) from None
