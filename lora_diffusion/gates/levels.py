"""What a weight is at one layer, and the gate rows it gives in one call of the model."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError
from lora_diffusion.gates.masks import Region
from lora_diffusion.gates.schedules import Schedule, parse_schedule, value_at

Level = float | Schedule | tuple["Level", ...] | Region  # at one layer: number, schedule, by image, by place

#: layers that see text tokens alone, whatever their number
_TEXT = re.compile(r"attn2\.to_[kv]$|add_[qkv]_proj$|to_add_out$|_context\b|context_embedder")


@dataclass
class Call:
    """One call of a model: how far the run is, its latent grid (rows, columns) and its number of text tokens."""

    progress: float = 0.0
    grid: tuple[int, int] | None = None
    text: int = 0
    masks: dict[tuple[int, tuple[int, int]], Tensor] = field(default_factory=dict)

    def tokens(self, region: Region, layer: str, shape: Sequence[int]) -> Tensor:
        """The mask at a layer whose input is (batch, *shape, features): (tokens,), or (1,) where it has no place."""
        if len(shape) == 2:
            return self._resampled(region, (shape[0], shape[1]))
        if len(shape) > 2:  # a video's
            return torch.tensor([region.mean])
        text = self.text if shape and not _TEXT.search(layer) else 0
        for extra in (0, text):
            grid = self._level(shape[0] - extra) if shape and not _TEXT.search(layer) else None
            if grid is not None:
                mean = torch.full((extra,), region.mean)
                return torch.cat([mean, self._resampled(region, grid)]) if extra else self._resampled(region, grid)
        return torch.tensor([region.mean])

    def _level(self, tokens: int) -> tuple[int, int] | None:
        """The resolution of the model that has this many tokens: the latent grid or a halving of it."""
        if self.grid is None or tokens < 1:
            return None
        rows, columns = self.grid
        while rows * columns > tokens and rows * columns > 1:
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        return (rows, columns) if rows * columns == tokens else None

    def _resampled(self, region: Region, grid: tuple[int, int]) -> Tensor:
        key = (id(region), grid)
        if key not in self.masks:
            self.masks[key] = region.tokens(grid)
        return self.masks[key]


def check_level(level: Any, adapter: str) -> Level:
    """`level` in its simplest form: full masks dropped, lists as tuples. ConfigError for what is no weight.

    A function is asked for its value at the beginning, so that one that has none there is refused here.
    """
    if isinstance(level, list | tuple):
        if not level:
            raise ConfigError(f"adapter {adapter!r}: an empty list of weights; expected one an image")
        if any(_is_by_image(one) for one in level):
            raise ConfigError(f"adapter {adapter!r}: a list of weights within another; expected one weight an image")
        return tuple(check_level(one, adapter) for one in level)
    if isinstance(level, Region):
        inner, cover = check_level(level.weight, adapter), level.uniform()
        return inner if cover == 1 else 0.0 if cover == 0 else level
    if isinstance(level, str) and "@" in level:
        return parse_schedule(level)
    if callable(level):
        schedule = cast("Schedule", level)
        value_at(schedule, 0.0)
        return schedule
    if isinstance(level, bool) or not isinstance(level, int | float) or not abs(level) <= sys.float_info.max:
        raise ConfigError(f"adapter {adapter!r}: weight {level!r} is not a finite number")
    return float(level)


def _is_by_image(level: Any) -> bool:
    return _is_by_image(level.weight) if isinstance(level, Region) else isinstance(level, list | tuple)


def images_of(level: Level) -> int:
    """For how many images it has a weight each; 1 where all have the same."""
    return len(level) if isinstance(level, tuple) else 1


def at_image(level: Level, image: int) -> Level:
    """What it is for one image of the batch, counted on through the list."""
    return level[image % len(level)] if isinstance(level, tuple) else level


def is_live(level: Level) -> bool:
    """Whether it needs more than one number a call: by image or by place."""
    return isinstance(level, tuple | Region)


def has_places(level: Level) -> bool:
    """Whether it is not the same everywhere in an image."""
    return isinstance(level, Region) or (isinstance(level, tuple) and any(map(has_places, level)))


def is_steady(level: Level) -> bool:
    """Whether neither step nor place changes it."""
    return isinstance(level, float) or (isinstance(level, tuple) and all(map(is_steady, level)))


def number_at(level: Level, progress: float) -> float:
    """The number of a level that is not live; of a live one, 1 unless it is always zero everywhere."""
    if isinstance(level, tuple | Region):
        parts = level if isinstance(level, tuple) else (check_level(level.weight, "region"),)
        return float(any(callable(one) or number_at(one, progress) for one in parts))
    return level if isinstance(level, float | int) else value_at(level, progress)


def entry_gate(level: Level, call: Call, layer: str, batch: int, shape: Sequence[int]) -> Tensor:
    """The weight of one adapter at one layer: (1 or batch, 1 or tokens, 1), float32.

    A list of n weights serves a batch of k · n, as classifier-free guidance repeats it. ConfigError otherwise.
    """
    if isinstance(level, tuple):
        if batch % len(level):
            raise ConfigError(
                f"{len(level)} weights by image, but {layer!r} gets a batch of {batch}; give one weight an image, "
                "and to the text encoder one a prompt"
            )
        if not any(is_live(one) for one in level):
            numbers = torch.tensor([number_at(one, call.progress) for one in level])
            return numbers.repeat(batch // len(level)).view(-1, 1, 1)
        rows = [entry_gate(one, call, layer, 1, shape) for one in level]
        tokens = max(row.shape[1] for row in rows)
        return torch.cat([row.expand(1, tokens, 1) for row in rows]).repeat(batch // len(level), 1, 1)
    if isinstance(level, Region):
        inner = entry_gate(check_level(level.weight, "region"), call, layer, batch, shape)
        return inner * call.tokens(level, layer, shape)[None, :, None]
    return torch.tensor(number_at(level, call.progress)).view(1, 1, 1)
