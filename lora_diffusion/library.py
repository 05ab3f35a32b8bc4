"""Adapters named in prompts, and the folder they are looked up in.

a fox <lora:ink:0.8> in the snow               one number
<lora:kiki:te=0.5:unet=1>                      by component or block
<lora:styles/ink:0@0,1@0.5>                    a schedule; "styles" is a folder inside the library
<lora:ink:0.8:mask=left.png>                   in a region: a picture in the library, or mask=0-0.5,0-1 (left half)

A name, a mask's too, is compared with the files that are in the library and never joined to a path, so it cannot
leave it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError, TargetError, did_you_mean, some
from lora_diffusion.gates import parse_weight

_TAG = re.compile(r"<lora:([^<>]*)>")
_PICTURES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


class Library:
    """A folder of adapter files (`*.safetensors`) and pictures of masks, subfolders included."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def files(self) -> list[Path]:
        """Every adapter in it, sorted; links that lead out are not in it. ConfigError where there is no such folder."""
        return self._inside("*.safetensors")

    @cached_property
    def pictures(self) -> list[Path]:
        """Every picture in it, likewise."""
        return [path for path in self._inside("*") if path.suffix.lower() in _PICTURES]

    def find(self, name: str) -> Path:
        """The adapter called `name` (without its ending). TargetError for an unknown or ambiguous name."""
        paths = {path.relative_to(self.folder).with_suffix("").as_posix(): path for path in self.files}
        return paths[self._long("adapter", name, paths)]

    def mask(self, name: str) -> Path:
        """The picture called `name`, with its ending. TargetError for an unknown or ambiguous name."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in self.pictures}
        return paths[self._long("mask", name, paths)]

    def _inside(self, pattern: str) -> list[Path]:
        if not self.folder.is_dir():
            raise ConfigError(f"library {self.folder} is no folder; say where the adapters are with --library")
        root = self.folder.resolve()
        return [path for path in sorted(self.folder.rglob(pattern)) if path.resolve().is_relative_to(root)]

    def _long(self, kind: str, name: str, there: Collection[str]) -> str:
        """The one of `there` that is `name`, or that ends in it after a folder."""
        if name in there:
            return name
        found = [long for long in there if long.rpartition("/")[2] == name]
        if not found:
            known = dict.fromkeys([*there, *(long.rpartition("/")[2] for long in there)])
            raise TargetError(f"no {kind} {name!r} in library {self.folder}{did_you_mean(name, known)}")
        if len(found) > 1:
            raise TargetError(f"{kind} {name!r} could be {some(found)} of library {self.folder}; name its folder too")
        return found[0]


def parse_prompt(prompt: str, library: Library | None = None) -> tuple[str, dict[str, Any]]:
    """(the prompt without its tags, name -> weight). ConfigError for a tag without a name, with a weight that is
    none, or that comes twice; masks are pictures of the library."""
    named: dict[str, Any] = {}
    for tag in _TAG.findall(prompt):
        name, _, weight = tag.partition(":")
        name = name.strip()
        if not name or name in named:
            raise ConfigError(f"prompt: <lora:{tag}> {'names an adapter twice' if name else 'names no adapter'}")
        named[name] = parse_weight(weight, library.mask if library else _nowhere) if weight else 1.0
    return (" ".join(_TAG.sub(" ", prompt).split()) if named else prompt), named


def _nowhere(name: str) -> Path:
    raise ConfigError(f"prompt: mask {name!r} is a picture of a library, and there is none")


def parse_prompts(prompts: Sequence[str], library: Library | None = None) -> tuple[list[str], dict[str, list[Any]]]:
    """(the prompts without tags, name -> its weight for each prompt, 0 where it is not named)."""
    parsed = [parse_prompt(prompt, library) for prompt in prompts]
    names = dict.fromkeys(name for _, named in parsed for name in named)
    return [text for text, _ in parsed], {name: [named.get(name, 0.0) for _, named in parsed] for name in names}


def by_image(weights: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """name -> one weight where all images have the same, else the list."""
    return {name: row[0] if all(one == row[0] for one in row) else list(row) for name, row in weights.items()}
