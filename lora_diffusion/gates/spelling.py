"""Weights as text, in prompts, options and recipes: `0.8`, `0@0,1@0.5`, `te=0.5:unet=1`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_diffusion.errors import ConfigError
from lora_diffusion.gates.schedules import Keyframes, Window, parse_schedule


def parse_weight(text: str) -> Any:
    """A number, a schedule, or parts joined by ":" (`te=0.5:unet=0@0,1@0.5`). ConfigError for anything else."""
    if "=" in text:
        parts = [part.partition("=") for part in text.split(":")]
        if not all(name.strip() and value.strip() for name, _, value in parts):
            raise ConfigError(f"weight {text!r}: expected parts such as te=0.5:unet=1")
        return {name.strip(): parse_weight(value) for name, _, value in parts}
    if "@" in text:
        parse_schedule(text)
        return text
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            f"weight {text!r}: expected a number, a schedule (0@0,1@0.5) or parts (te=0.5:unet=1)"
        ) from None
    if not math.isfinite(number):
        raise ConfigError(f"weight {text!r} is not a finite number")
    return number


def spell_weight(weight: Any) -> Any:
    """`weight` as JSON can say it, so that it reads back the same. ConfigError for functions and regions."""
    if isinstance(weight, Mapping):
        return {str(key): spell_weight(value) for key, value in weight.items()}
    if isinstance(weight, list | tuple):
        return [spell_weight(one) for one in weight]
    if isinstance(weight, Keyframes | Window):
        return str(weight)
    if isinstance(weight, int | float | str):
        return weight
    raise ConfigError(f"weight {weight!r} cannot be written down; a recipe holds numbers, schedules, lists and parts")


def times(weight: Any, factor: Any) -> Any:
    """`weight` multiplied by `factor`; one of them may be a schedule as text. ConfigError for two schedules."""
    if isinstance(weight, Mapping):
        return {key: times(value, factor) for key, value in weight.items()}
    if isinstance(weight, str) and isinstance(factor, str):
        raise ConfigError(f"weights {weight!r} and {factor!r} are both schedules; expected a number for one")
    if isinstance(factor, str):
        weight, factor = factor, weight
    if not isinstance(weight, str):
        return weight * factor
    schedule = parse_schedule(weight)
    if isinstance(schedule, Window):
        return str(Window(schedule.weight * factor, schedule.start, schedule.end))
    return str(Keyframes(tuple((at, value * factor) for at, value in schedule.points)))
