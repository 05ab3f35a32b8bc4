"""What a grid of pictures varies: two axes of labelled settings, and the order of pictures they span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lora_diffusion.errors import ConfigError
from lora_diffusion.gates import Region, parse_weight, times
from lora_diffusion.generating import Order
from lora_diffusion.library import parse_prompts

AXES = ("weight", "adapter", "prompt", "seed")


@dataclass(frozen=True)
class Choices:
    """Everything that a grid can vary: prompts, seeds, adapters by name with their weight, factors on these."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    adapters: Mapping[str, Any]
    factors: Sequence[Any]

    def labels(self, axis: str) -> list[str]:
        """A label for each place of an axis. ConfigError for an unknown axis."""
        if axis not in AXES:
            raise ConfigError(f"axis {axis!r} is none; expected one of {', '.join(AXES)}")
        factors = ["base" if factor == 0 else f"x {factor}" for factor in self.factors]
        return {
            "weight": [label.replace("x ", "") if "@" in label else label for label in factors],
            "adapter": list(self.adapters),
            "prompt": list(self.prompts),
            "seed": [f"seed {seed}" for seed in self.seeds],
        }[axis]


def parse_factors(text: str) -> list[Any]:
    """`0,0.5,1`, or with schedules among them `0;0.5;0@0,1@0.5` -> factors on weights. ConfigError otherwise."""
    try:
        factors = [parse_weight(part.strip()) for part in text.split(";" if "@" in text else ",")]
    except ConfigError:
        factors = [{}]
    if any(isinstance(factor, dict | Region) for factor in factors):
        expected = "expected numbers with commas between them, such as 0,0.5,1, or with schedules 0;0.5;0@0,1@0.5"
        raise ConfigError(f"--weights {text!r}: {expected}")
    return [int(factor) if isinstance(factor, float) and factor.is_integer() else factor for factor in factors]


def grid_order(choices: Choices, columns: str, rows: str) -> Order:
    """The pictures of a grid, row by row. What is on no axis keeps its first prompt, seed, factor 1, all adapters."""
    if columns == rows:
        raise ConfigError(f"both axes are {columns!r}; expected two different ones")
    prompts: list[str] = []
    seeds: list[int] = []
    weights: dict[str, list[Any]] = {name: [] for name in choices.adapters}
    for row, column in product(range(len(choices.labels(rows))), range(len(choices.labels(columns)))):
        at = {rows: row, columns: column}
        prompts.append(choices.prompts[at.get("prompt", 0)])
        seeds.append(choices.seeds[at.get("seed", 0)])
        factor = choices.factors[at["weight"]] if "weight" in at else 1
        for number, (name, weight) in enumerate(choices.adapters.items()):
            on = at.get("adapter", number) == number
            weights[name].append(times(weight, factor) if on else 0.0)
    clean, tagged = parse_prompts(prompts)
    if tagged:
        raise ConfigError("grid: <lora:…> in a prompt; name adapters with --adapter, so that the axes can vary them")
    return Order(clean, seeds, weights)
