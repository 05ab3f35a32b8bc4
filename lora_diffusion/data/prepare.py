"""One pass over all pictures that lists every fault before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.data.buckets import BucketRules, View, views
from lora_diffusion.data.examples import CaptionFrom, Example, Source, look_for
from lora_diffusion.data.pictures import PictureInfo, PictureRules, inspect_picture, open_mask
from lora_diffusion.errors import DataError

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
    skipped: Mapping[Path | str, str] = field(default_factory=dict[Path | str, str])

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

    Raises DataError as `look_for` does, and one that lists everything that cannot be used with its fault: pictures,
    captions, masks, metadata. With `skip_bad` that is left out and stands in the result, unless nothing is left.
    """
    found = look_for(sources, caption_from=caption_from, fallback_caption=fallback_caption)
    sizes, pictures = sizes or BucketRules(), pictures or PictureRules()
    items: list[Item] = []
    bad: dict[Path, str] = {}
    for done, example in enumerate(found.examples, start=1):
        try:
            items.append(_item(example, sizes, pictures, seed))
        except DataError as error:
            bad[example.picture] = str(error)
        if progress is not None:
            progress(done, len(found.examples))
    if not items:
        raise found.fault(bad, "nothing is left to train on")
    if (bad or found.bad or found.others) and not skip_bad:
        raise found.fault(bad, "repair or remove them, or go on without them by --skip-bad (data.skip_bad=true)")
    return Prepared(tuple(items), {**found.bad, **bad, **found.others})


def _item(example: Example, sizes: BucketRules, pictures: PictureRules, seed: int) -> Item:
    info = inspect_picture(example.picture, pictures)
    if example.mask is not None:
        open_mask(example.mask, info.size, pictures)
    try:
        return Item(example, info, views(info.size, sizes, seed=seed, key=info.content))
    except DataError as error:
        raise DataError(f"{example.picture}: {error}") from error
