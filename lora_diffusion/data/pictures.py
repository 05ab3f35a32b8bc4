"""Opening pictures safely: size limits from the header before anything is decoded, damage found before training.

A 17.6 kB PNG can decode to 702 MB. Here the header alone decides, and nothing above `max_pixels` is ever decoded.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lora_diffusion.errors import DataError

__all__ = ["PictureInfo", "PictureRules", "inspect_picture", "open_mask", "open_picture"]


@dataclass(frozen=True)
class PictureRules:
    """What counts as usable, and what shows through where a picture is transparent.

    `max_pixels` (width x height) and `min_side` (pixels) are read from the header. `background` is red, green,
    blue, each 0..255.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 100_000_000
    min_side: int = 16


@dataclass(frozen=True)
class PictureInfo:
    """(width, height) as seen, that is after EXIF orientation, and the SHA-256 of the file's bytes."""

    size: tuple[int, int]
    content: str


def inspect_picture(path: str | os.PathLike[str], rules: PictureRules | None = None) -> PictureInfo:
    """Decode the whole picture and throw it away. DataError names the path and the fault."""
    size = open_picture(path, rules).size
    with Path(path).open("rb") as file:
        return PictureInfo(size, hashlib.file_digest(file, "sha256").hexdigest())


def open_picture(path: str | os.PathLike[str], rules: PictureRules | None = None) -> Image.Image:
    """The picture upright, in RGB, alpha laid over `rules.background`; the first frame of an animation.

    DataError for a file that is no picture, is truncated or damaged, or breaks the rules.
    """
    rules = rules or PictureRules()
    with _opened(path, rules) as image:
        upright = _eight_bits(ImageOps.exif_transpose(image))
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        colour = upright.convert("RGBA")
        ground = Image.new("RGBA", colour.size, (*rules.background, 255))
        return Image.alpha_composite(ground, colour).convert("RGB")


def open_mask(path: str | os.PathLike[str], size: tuple[int, int], rules: PictureRules | None = None) -> Image.Image:
    """The mask in greys (mode "L"), white where the loss counts; DataError unless it has the picture's `size`."""
    with _opened(path, rules or PictureRules()) as image:
        mask = _eight_bits(ImageOps.exif_transpose(image)).convert("L")
    if mask.size != size:
        found, wanted = "x".join(map(str, mask.size)), "x".join(map(str, size))
        raise DataError(f"{path}: the mask is {found} pixels, its picture is {wanted}; they must be the same")
    return mask


@contextmanager
def _opened(path: str | os.PathLike[str], rules: PictureRules) -> Generator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `max_pixels`
            image = Image.open(path)
        with image:
            _check_size(path, image, rules)
            image.load()
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is no picture of a known format, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: has more than {rules.max_pixels:,} pixels, and was not decoded") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:  # what Pillow's decoders raise
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is truncated or damaged: {error}") from error


def _check_size(path: str | os.PathLike[str], image: Image.Image, rules: PictureRules) -> None:
    width, height = image.size
    if width * height > rules.max_pixels:
        raise DataError(f"{path}: has {width}x{height} pixels, more than {rules.max_pixels:,}, and was not decoded")
    if min(width, height) < rules.min_side:
        raise DataError(f"{path}: has {width}x{height} pixels; expected at least {rules.min_side} on each side")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 (Pillow would clip them); floating-point pictures are refused."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
