"""One pass over all pictures that lists every fault before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.data.buckets import BucketRules, View, views
from lora_diffusion.data.examples import CaptionFrom, Example, Source, find_examples
from lora_diffusion.data.pictures import PictureInfo, PictureRules, inspect_picture, open_mask
from lora_diffusion.errors import DataError, in_lines

__all__ = ["Item", "Prepared", "prepare"]


@dataclass(frozen=True)
class Item:
    """An example whose picture is known to decode, with the views to train on."""

    example: Example
    picture: PictureInfo
    views: tuple[View, ...]


@dataclass(frozen=True)
class Prepared:
    """What can be trained on, and what was left out and why (only with `skip_bad`)."""

    items: tuple[Item, ...]
    skipped: Mapping[Path, str] = field(default_factory=dict[Path, str])

    def __str__(self) -> str:
        lines = [f"{len(self.items)} pictures, {sum(len(item.views) for item in self.items)} views"]
        return "\n".join([*lines, *(f"  left out: {why}" for why in self.skipped.values())])


def prepare(
    sources: Sequence[Source] | str | os.PathLike[str],
    *,
    sizes: BucketRules | None = None,
    pictures: PictureRules | None = None,
    caption_from: CaptionFrom = "files",
    fallback_caption: str | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Find, decode and size every picture; `progress(done, total)` is called after each.

    Raises DataError as `find_examples` does, and one that lists all pictures and masks that cannot be used, each with
    its fault; with `skip_bad` they are left out and stand in the result, unless nothing is left.
    """
    examples = find_examples(sources, caption_from=caption_from, fallback_caption=fallback_caption)
    sizes, pictures = sizes or BucketRules(), pictures or PictureRules()
    items: list[Item] = []
    bad: dict[Path, str] = {}
    for done, example in enumerate(examples, start=1):
        try:
            items.append(_item(example, sizes, pictures, seed))
        except DataError as error:
            bad[example.picture] = str(error)
        if progress is not None:
            progress(done, len(examples))
    if bad and (not skip_bad or not items):
        advice = "repair or remove them, or set data.skip_bad=true" if items else "nothing is left to train on"
        raise DataError(
            f"{len(bad)} of {len(examples)} pictures cannot be used; {advice}:{in_lines(list(bad.values()))}"
        )
    return Prepared(tuple(items), bad)


def _item(example: Example, sizes: BucketRules, pictures: PictureRules, seed: int) -> Item:
    info = inspect_picture(example.picture, pictures)
    if example.mask is not None:
        open_mask(example.mask, info.size, pictures)
    try:
        return Item(example, info, views(info.size, sizes, seed=seed, key=info.content))
    except DataError as error:
        raise DataError(f"{example.picture}: {error}") from error
