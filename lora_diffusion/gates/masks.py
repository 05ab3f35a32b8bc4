"""Regions: where in the picture an adapter acts, resampled to the token grid of each layer.

A mask covers the picture as it is shown; 1 is full weight, 0 none, and what is transparent is 0. Each layer sees it
averaged down to its own grid. Places without a position in the picture (text tokens of cross and joint attention, time
and pooled embeddings, text encoders) take the mask's mean, so that a full mask is no mask and an empty one is the base.

As text a mask is a file's path or a rectangle: `0-0.5,0-1` is the left half, `0-1,0.5-1` the lower one (from-to
across, from-to downwards, as shares of the picture).
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import io
import re
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_diffusion.errors import ConfigError

_RECTANGLE = re.compile(r"(\d*\.?\d+)-(\d*\.?\d+),(\d*\.?\d+)-(\d*\.?\d+)")
_SIDE = 768  # pixels a rectangle is drawn in: a multiple of the usual token grids (64, 96, 128, 32, 48, …)
LARGEST = 2**20  # bytes of a mask as PNG that a recipe holds
_PIXELS = 2**26  # and its pixels


@dataclass(frozen=True, eq=False)
class Region:
    """`weight` inside a mask: a PIL picture, a file of one, a rectangle as text (`0-0.5,0-1`: the left half), or a
    (height, width) array in 0..1 (uint8: 0..255). Regions with the same pixels and weight are equal."""

    mask: Any
    weight: Any = 1.0
    pixels: Tensor = field(init=False, repr=False)  # (height, width) float32 in 0..1

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", read_mask(self.mask))

    def __repr__(self) -> str:
        return f"Region({tuple(self.pixels.shape)}, mean {self.mean:.2f}, {self.weight!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        return self.weight == other.weight and torch.equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash(tuple(self.pixels.shape))

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
    if isinstance(mask, str) and is_rectangle(mask):
        return _rectangle(mask)
    if isinstance(mask, str | Path):
        mask = _opened(Path(mask))
    try:
        pixels = _greys(mask) if hasattr(mask, "convert") else torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"mask {mask!r:.60}: {error}; expected a picture, its path or an array") from None
    if pixels.dim() == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    numbers = pixels.detach().cpu().float() / (255 if pixels.dtype == torch.uint8 else 1)
    if numbers.dim() != 2 or not numbers.numel():
        raise ConfigError(f"mask of shape {tuple(pixels.shape)}: expected (height, width)")
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise ConfigError("mask: values outside 0..1; expected 0 (outside) to 1 (inside), or uint8 up to 255")
    return numbers


def _opened(path: Path) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)  # a copy, decoded
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise ConfigError(f"mask {path}: {error}") from None


def _greys(picture: Any) -> Tensor:
    """(height, width): uint8, or float32 in 0..1 of 16-bit greys, which Pillow would clip. What is transparent is 0."""
    from PIL import Image

    if picture.mode == "F":
        return torch.from_numpy(np.array(picture))
    if picture.mode.startswith("I"):  # rounded to the 256 levels that a recipe holds
        return (torch.from_numpy(np.array(picture).astype(np.float32)) / 257).round() / 255
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return torch.from_numpy(np.array(picture.convert("L")))


def is_rectangle(text: str) -> bool:
    """Whether a mask as text is a rectangle and no file: four numbers, `left-right,top-bottom`."""
    return bool(_RECTANGLE.fullmatch(text.strip()))


def _rectangle(text: str) -> Tensor:
    """(768, 768): the share of each pixel inside. ConfigError for one that is empty or leaves the picture."""
    found = _RECTANGLE.fullmatch(text.strip())
    left, right, top, bottom = (float(part) for part in (found.groups() if found else ("0", "0", "0", "0")))
    if not (left < right <= 1 and top < bottom <= 1):
        raise ConfigError(f"mask {text!r}: expected left-right,top-bottom as rising shares in 0..1, such as 0-0.5,0-1")
    starts = torch.arange(_SIDE, dtype=torch.float64)
    across, down = (
        ((starts + 1).clamp(max=high * _SIDE) - starts.clamp(min=low * _SIDE)).clamp(0, 1)
        for low, high in ((left, right), (top, bottom))
    )
    return torch.outer(down, across).float()


def write_mask(region: Region, masks: MutableMapping[str, str]) -> str:
    """The sha256 of the pixels, under which `masks` then holds the mask as a PNG of one channel in base64.

    One that is there already is not packed again. ConfigError for values between the 256 that 8 bits have, or a PNG
    of more than 1 MiB.
    """
    from PIL import Image

    levels = (region.pixels * 255).round().to(torch.uint8)
    if not torch.equal(levels.float() / 255, region.pixels):
        raise ConfigError(f"{region!r} cannot be written down: it has values between those of 8 bits; give uint8")
    height, width = levels.shape
    data = levels.contiguous().numpy().tobytes()
    if (key := _hash(width, height, data)) in masks:
        return key
    file = io.BytesIO()
    Image.frombytes("L", (width, height), data).save(file, "PNG", optimize=True)
    if len(file.getvalue()) > LARGEST or height * width > _PIXELS:
        size = f"{width}x{height} pixels, {len(file.getvalue()) / 2**20:.1f} MiB as PNG"
        raise ConfigError(f"{region!r} cannot be written down: {size}, expected at most 1 MiB; scale it to 1024x1024")
    masks[key] = base64.b64encode(file.getvalue()).decode("ascii")
    return key


def mask_again(key: str, text: str) -> Any:
    """The mask as a PIL picture from what `write_mask` gave. ConfigError where its content is not that of `key`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
            if picture.width * picture.height > _PIXELS:
                raise ConfigError(f"mask {key[:12]}…: {picture.width}x{picture.height} pixels are too many")
            mask = picture.convert("L")
    except (OSError, SyntaxError, binascii.Error, zlib.error, Image.DecompressionBombError) as error:
        raise ConfigError(f"mask {key[:12]}…: {error}") from None
    if _hash(mask.width, mask.height, mask.tobytes()) != key:
        raise ConfigError(f"mask {key[:12]}…: its pixels are not those that it is named after")
    return mask


def _hash(width: int, height: int, data: bytes) -> str:
    return hashlib.sha256(f"{width}x{height}:".encode() + data).hexdigest()
