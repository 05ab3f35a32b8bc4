"""Weights that change while a picture is made: functions of progress, 0 in the first denoiser call, 1 in the last."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lora_diffusion.errors import ConfigError

Schedule = Callable[[float], float]  # progress in [0, 1] -> weight

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_KEYFRAME = re.compile(rf"\s*({_NUMBER})@({_NUMBER})\s*")
_WINDOW = re.compile(rf"\s*({_NUMBER})@(\d*\.?\d+)-(\d*\.?\d+)\s*")


@dataclass(frozen=True)
class Keyframes:
    """(progress, weight) points joined by straight lines; constant before the first and after the last."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        times = [time for time, _ in self.points]
        if not times or any(not 0 <= time <= 1 for time in times) or any(a >= b for a, b in pairwise(times)):
            raise ConfigError(f"keyframes at {times}: expected progress that rises, each in [0, 1]")
        if not all(math.isfinite(value) for _, value in self.points):
            raise ConfigError(f"keyframes {self}: a weight is not a finite number")

    def __call__(self, progress: float) -> float:
        """The weight at `progress`."""
        before = [point for point in self.points if point[0] <= progress]
        after = [point for point in self.points if point[0] > progress]
        if not before or not after:
            return (before or after)[-1 if before else 0][1]
        (start, low), (end, high) = before[-1], after[0]
        return low + (high - low) * (progress - start) / (end - start)

    def __str__(self) -> str:
        return ",".join(f"{value!r}@{time!r}" for time, value in self.points)


@dataclass(frozen=True)
class Window:
    """`weight` while start <= progress <= end, else 0."""

    weight: float
    start: float
    end: float

    def __post_init__(self) -> None:
        if not (0 <= self.start <= self.end <= 1 and math.isfinite(self.weight)):
            raise ConfigError(f"window {self}: expected a finite weight and 0 <= start <= end <= 1")

    def __call__(self, progress: float) -> float:
        """The weight at `progress`."""
        return self.weight if self.start <= progress <= self.end else 0.0

    def __str__(self) -> str:
        return f"{self.weight!r}@{self.start!r}-{self.end!r}"


def linear(start: float, end: float) -> Keyframes:
    """From `start` in the first denoiser call to `end` in the last."""
    return Keyframes(((0.0, float(start)), (1.0, float(end))))


def window(weight: float, start: float, end: float) -> Window:
    """`weight` in the part of the run between `start` and `end` (progress, both included), else 0."""
    return Window(float(weight), float(start), float(end))


def parse_schedule(text: str) -> Keyframes | Window:
    """`0@0,1@0.5` (keyframes) or `0.8@0.2-0.6` (window). ConfigError for anything else."""
    if found := _WINDOW.fullmatch(text):
        return Window(*(float(part) for part in found.groups()))
    points = [_KEYFRAME.fullmatch(part) for part in text.split(",")]
    if not all(points):
        raise ConfigError(f"schedule {text!r}: expected weight@progress such as '0@0,1@0.5', or '0.8@0.2-0.6'")
    return Keyframes(tuple((float(point[2]), float(point[1])) for point in points if point))


def value_at(schedule: Schedule, progress: float) -> float:
    """The schedule's weight. ConfigError where it is not a finite number."""
    value = schedule(progress)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"schedule {schedule} gives {value!r} at progress {progress:g}; expected a finite number")
    return number
