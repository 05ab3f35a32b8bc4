"""Which size a picture is trained at, how it is cut to it, and what SDXL wants to know about that.

A bucket is a width and a height, both multiples of a step, with at most `resolution` squared pixels. A picture goes
to the one nearest its own shape, is scaled to cover it and loses what stands over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal, get_args

from PIL import Image

from lora_diffusion.errors import ConfigError, DataError

__all__ = ["BucketRules", "Crop", "View", "buckets", "cut", "views"]

Crop = Literal["centre", "random"]
Size = tuple[int, int]


@dataclass(frozen=True)
class BucketRules:
    """How pictures are sized.

    resolutions  pixels; the area of a bucket is at most its square. Several: every picture is trained at each
    step         width and height are multiples of it: the VAE's factor times the denoiser's patch or stride
    max_aspect   longest side over shortest, at most
    upscale      enlarge pictures that are smaller than their bucket; without, they get a bucket of their own size
    crop         "centre", or `crops` cuts at random places
    flip         every view also mirrored
    """

    resolutions: tuple[int, ...] = (512,)
    step: int = 64
    max_aspect: float = 2.0
    upscale: bool = False
    crop: Crop = "centre"
    crops: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop not in get_args(Crop):
            raise ConfigError(f"crop is {self.crop!r}; expected 'centre' or 'random'")
        if not self.resolutions or self.step < 1 or min(self.resolutions) < self.step:
            raise ConfigError(f"resolutions {self.resolutions} must each be at least the step, {self.step}")
        if self.max_aspect < 1 or self.crops < 1:
            raise ConfigError(f"max_aspect {self.max_aspect} and crops {self.crops} must be at least 1")


@dataclass(frozen=True)
class View:
    """One way to cut one picture. All in pixels; `left` and `top` are measured in the scaled picture, unmirrored."""

    bucket: Size  # (width, height) of what is trained on
    scaled: Size  # (width, height) the whole picture is scaled to first
    left: int
    top: int
    flipped: bool
    original: Size  # (width, height) of the picture

    @property
    def micro_conditioning(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's time ids: original height, width, crop top, left, target height, width (arXiv:2307.01952, 2.2)."""
        left = self.scaled[0] - self.bucket[0] - self.left if self.flipped else self.left
        return (*reversed(self.original), self.top, left, *reversed(self.bucket))  # type: ignore[return-value]


@cache
def buckets(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Every (width, height) of that area: for each width the greatest height, in both orientations, sorted."""
    found: set[Size] = set()
    area, width = resolution**2, step
    while width * width <= area:
        height = area // width // step * step
        if height <= width * max_aspect:
            found |= {(width, height), (height, width)}
        width += step
    return tuple(sorted(found))


def views(size: Size, rules: BucketRules, *, seed: int, key: str = "") -> tuple[View, ...]:
    """Every view of a picture of `size` (width, height), the same for the same arguments; `key` tells pictures apart.

    DataError for a picture smaller than one step that must not be upscaled.
    """
    random = Random(f"{seed}/{key}/crop")
    found = [
        View(bucket, scaled, *offset, flipped, size)
        for resolution in rules.resolutions
        for bucket in (_bucket(size, resolution, rules),)
        for scaled in (_cover(size, bucket),)
        for offset in _offsets(scaled, bucket, rules, random)
        for flipped in ((False, True) if rules.flip else (False,))
    ]
    return tuple(dict.fromkeys(found))  # a picture too small for two resolutions gets one view, not two


def cut(image: Image.Image, view: View, *, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """`image` scaled, cropped and mirrored: `view.bucket` in size. DataError for the view of another size."""
    if image.size != view.original:
        raise DataError(f"a picture of {image.size} pixels was cut by the view of one of {view.original} pixels")
    left, top, (width, height) = view.left, view.top, view.bucket
    scaled = image if image.size == view.scaled else image.resize(view.scaled, resample)
    part = scaled.crop((left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else part


def _bucket(size: Size, resolution: int, rules: BucketRules) -> Size:
    shape = math.log(size[0] / size[1])
    choice = buckets(resolution, rules.step, rules.max_aspect)
    best = min(choice, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - shape), -bucket[0] * bucket[1]))
    if rules.upscale or (best[0] <= size[0] and best[1] <= size[1]):
        return best
    width, height = (min(side, resolution * 2) // rules.step * rules.step for side in size)
    if not width or not height:
        raise DataError(f"{size[0]}x{size[1]} pixels are less than one step of {rules.step}; set upscale to enlarge it")
    limit = max(rules.step, int(min(width, height) * rules.max_aspect) // rules.step * rules.step)
    width, height = min(width, limit), min(height, limit)
    while width * height > resolution**2:  # a long thin picture keeps its short side
        width, height = (width - rules.step, height) if width > height else (width, height - rules.step)
    return width, height


def _cover(size: Size, bucket: Size) -> Size:
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def _offsets(scaled: Size, bucket: Size, rules: BucketRules, random: Random) -> Iterator[Size]:
    slack = scaled[0] - bucket[0], scaled[1] - bucket[1]
    if rules.crop == "centre":
        yield slack[0] // 2, slack[1] // 2
        return
    for _ in range(rules.crops):
        yield random.randint(0, slack[0]), random.randint(0, slack[1])
