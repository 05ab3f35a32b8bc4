"""Defaults by what is to be learned: `recipe = "style"` or `"character"`. What the file says itself always wins.

docs/training.md has the same table with the source of each number; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Mapping[str, Any]]

RECIPES: dict[str, Settings] = {
    "style": {
        "data": {"caption_dropout": 0.05, "flip": True},
        "adapter": {"targets": "attention+ff", "rank": 16},
        "times": {"emphasis": 0.5},
        "train": {"batch": 4, "exposures": 100, "steps": 3000, "ema": 0.99},
    },
    "character": {
        "data": {"caption_dropout": 0.0, "flip": False},
        "adapter": {"targets": "attention", "rank": 8},
        "times": {"emphasis": 0.0},
        "prior": {"kind": "teacher", "weight": 1.0},
        "train": {"batch": 2, "exposures": 200, "steps": 2000},
    },
}
NEEDS_TRIGGER = ("character",)  # recipes that learn one thing, which must have a word


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` settings over those of the recipe they name; as they are where they name none.

    Who says how many steps there shall be gets as many: then the recipe does not count pictures. Nor does it average
    what an optimiser averages.
    """
    merged = dict(given)
    recipe = RECIPES.get(str(given.get("recipe")), {})
    for section, defaults in recipe.items():
        said = given.get(section, {})
        if isinstance(said, Mapping):
            left_out = {"exposures"} if "steps" in said else set[str]()
            left_out |= {"ema"} if said.get("optimizer") == "schedule-free" else set()  # it has an average
            merged[section] = {key: value for key, value in defaults.items() if key not in left_out} | dict(said)
    return merged


def steps_for(steps: int, exposures: int | None, seen_an_epoch: float, seen_a_step: int) -> int:
    """Optimiser steps of a run: at most `steps`, and so many that each picture is seen `exposures` times."""
    if exposures is None:
        return steps
    return max(1, min(steps, math.ceil(exposures * seen_an_epoch / seen_a_step)))
