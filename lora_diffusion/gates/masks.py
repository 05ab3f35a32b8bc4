"""Regions: where in the picture an adapter acts, resampled to the token grid of each layer.

A mask covers the picture as it is shown; 1 is full weight, 0 none. Each layer sees it averaged down to its own
grid. Places without a position in the picture (text tokens of cross and joint attention, time and pooled
embeddings, text encoders) take the mask's mean, so that a full mask is no mask and an empty one is the base.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Region:
    """`weight` inside a mask: a PIL picture, a file of one, or a (height, width) array in 0..1 (uint8: 0..255)."""

    mask: Any
    weight: Any = 1.0
    pixels: Tensor = field(init=False, repr=False)  # (height, width) float32 in 0..1

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", read_mask(self.mask))

    def __repr__(self) -> str:
        return f"Region({tuple(self.pixels.shape)}, mean {self.mean:.2f}, {self.weight!r})"

    def at(self, weight: Any) -> Region:
        """The same place with another weight."""
        region = copy.copy(self)
        object.__setattr__(region, "weight", weight)
        return region

    @property
    def mean(self) -> float:
        """Share of the picture inside."""
        return float(self.pixels.mean())

    def uniform(self) -> float | None:
        """1 for a full mask, 0 for an empty one, else None."""
        low, high = (float(value) for value in torch.aminmax(self.pixels))
        return low if low == high and low in (0.0, 1.0) else None

    def tokens(self, grid: tuple[int, int]) -> Tensor:
        """The mask averaged to `grid` (rows, columns): (rows · columns,)."""
        return F.interpolate(self.pixels[None, None], size=grid, mode="area").flatten()


def read_mask(mask: Any) -> Tensor:
    """(height, width) float32 in 0..1 from a path, PIL picture, array or tensor. ConfigError for anything else."""
    if isinstance(mask, str | Path):
        mask = _opened(Path(mask))
    if hasattr(mask, "convert"):
        mask = mask.convert("L")
        pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width)
    else:
        pixels = torch.as_tensor(mask)
    if pixels.dim() == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    numbers = pixels.detach().cpu().float() / (255 if pixels.dtype == torch.uint8 else 1)
    if numbers.dim() != 2 or not numbers.numel():
        raise ConfigError(f"mask of shape {tuple(pixels.shape)}: expected (height, width)")
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise ConfigError("mask: values outside 0..1; expected 0 (outside) to 1 (inside), or uint8 up to 255")
    return numbers


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("L")
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"mask {path}: {error}") from None
