"""Pictures with their captions, masks, repeats and weights, from the spellings people use.

a folder    pictures, each with `name.txt` or `name.caption` beside it,
            or `metadata.jsonl` / `metadata.json` with `file_name` and `text` (or `caption`)
sub-folder  like its parent; one called `10_sks dog` (kohya) repeats its pictures ten times, and captions
            those that have no caption of their own with `sks dog`
masks       `masks/name.png` in the same folder, or `name.mask.png` beside the picture
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora_diffusion.errors import ConfigError, DataError, in_lines

__all__ = ["PICTURE_SUFFIXES", "CaptionFrom", "Example", "Source", "find_examples"]

#: file names that count as pictures, lower case
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

CaptionFrom = Literal["files", "filename"]

_MASKS = "masks"
_REPEATS = re.compile(r"(\d+)_(.*)")
_TEXT_KEYS = ("text", "caption", "tags")


@dataclass(frozen=True)
class Source:
    """One folder of pictures. `weight` multiplies how often they are seen; class pictures are regularisation."""

    folder: Path
    weight: float = 1.0
    repeats: int = 1
    regularisation: bool = False


@dataclass(frozen=True)
class Example:
    """One picture with its caption. `share` is how often it is seen per epoch: repeats times weight."""

    picture: Path
    caption: str
    share: float = 1.0
    mask: Path | None = None
    regularisation: bool = False


def find_examples(
    sources: Sequence[Source] | str | os.PathLike[str],
    *,
    caption_from: CaptionFrom = "files",
    fallback_caption: str | None = None,
) -> list[Example]:
    """Every picture below the folders, sorted by path within each; a single folder may be given as its path.

    With `caption_from="filename"` the caption is the file's name, `red_fox-2.png` -> "red fox 2". Otherwise metadata
    wins over a caption file, which wins over the name of a kohya folder, which wins over `fallback_caption`.

    Raises DataError for a missing folder, one without pictures, pictures without a caption (all of them are listed),
    metadata that cannot be read or names files that are not there; ConfigError for a wrong setting.
    """
    if caption_from not in get_args(CaptionFrom):
        raise ConfigError(f"caption_from is {caption_from!r}; expected 'files' or 'filename'")
    if isinstance(sources, str | os.PathLike):
        sources = [Source(Path(sources))]
    examples: list[Example] = []
    bare: list[Path] = []
    for source in sources:
        for picture, found in _captioned(source, caption_from):
            caption = found or fallback_caption
            if caption is None:
                bare.append(picture)
                continue
            share = source.weight * source.repeats * _repeats(picture.parent, source.folder)
            examples.append(Example(picture, caption, share, _mask_of(picture), source.regularisation))
    if bare:
        raise DataError(
            f"{len(bare)} of {len(bare) + len(examples)} pictures have no caption; put a .txt file beside each, or set "
            f"data.fallback_caption or data.caption_from=filename:{in_lines(bare)}"
        )
    return examples


def _captioned(source: Source, caption_from: CaptionFrom) -> Iterator[tuple[Path, str | None]]:
    if source.repeats < 1 or source.weight <= 0:
        raise ConfigError(f"{source.folder}: repeats {source.repeats} and weight {source.weight} must be above zero")
    if not source.folder.is_dir():
        found = "is a file" if source.folder.exists() else "does not exist"
        raise DataError(f"{source.folder}: {found}; expected a folder of pictures")
    pictures = sorted(_pictures(source.folder))
    if not pictures:
        raise DataError(f"{source.folder}: holds no pictures; looked for {', '.join(PICTURE_SUFFIXES)} here and below")
    metadata: dict[Path, str] = {}
    for folder in sorted({source.folder, *(picture.parent for picture in pictures)}):
        metadata |= _metadata(folder)
    for picture in pictures:
        if caption_from == "filename":
            yield picture, re.sub(r"[\s_\-]+", " ", picture.stem).strip()
        else:
            yield picture, metadata.get(picture) or _beside(picture) or _kohya_name(picture.parent, source.folder)


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.name != _MASKS:
                yield from _pictures(path)
        elif path.suffix.lower() in PICTURE_SUFFIXES and not path.stem.endswith(".mask"):
            yield path


def _beside(picture: Path) -> str | None:
    """The caption file's text on one line; None where there is none or it is empty."""
    for suffix in (".txt", ".caption"):
        path = picture.with_suffix(suffix)
        if path.is_file():
            return " ".join(_read(path).split()) or None
    return None


def _kohya_name(folder: Path, root: Path) -> str | None:
    match = _kohya(folder, root)
    return match[2].strip() or None if match else None


def _repeats(folder: Path, root: Path) -> int:
    match = _kohya(folder, root)
    return max(int(match[1]), 1) if match else 1


def _kohya(folder: Path, root: Path) -> re.Match[str] | None:
    """The nearest folder from `folder` up to `root` that is called `<repeats>_<name>`."""
    for inner in (folder, *folder.parents):
        if match := _REPEATS.fullmatch(inner.name):
            return match
        if inner == root:
            return None
    return None


def _mask_of(picture: Path) -> Path | None:
    beside = picture.with_name(f"{picture.stem}.mask.png")
    inside = picture.parent / _MASKS / f"{picture.stem}.png"
    return next((path for path in (beside, inside) if path.is_file()), None)


def _metadata(folder: Path) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for line, record in _records(folder):
        name, text = record.get("file_name"), next((record[key] for key in _TEXT_KEYS if key in record), None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise DataError(f"{line}: expected 'file_name' and 'text' (or 'caption'), found {sorted(record)}")
        path = _named(folder, name)
        if path is None:
            raise DataError(f"{line}: names {name!r}, which is no picture in {folder}")
        captions[path] = text.strip()
    return captions


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of `metadata.jsonl` and `metadata.json`, the latter as a list or as kohya's mapping by name."""
    lines, whole = folder / "metadata.jsonl", folder / "metadata.json"
    if lines.is_file():
        for number, text in enumerate(_read(lines).splitlines(), start=1):
            if text.strip():
                yield f"{lines}, line {number}", _mapping(text, f"{lines}, line {number}")
    if whole.is_file():
        found = _json(_read(whole), str(whole))
        if isinstance(found, dict):
            found = [{"file_name": name, **record} for name, record in found.items() if isinstance(record, dict)]
        if not isinstance(found, list):
            raise DataError(f"{whole}: expected a list of records or a mapping from file names to records")
        yield from (
            (f"{whole}, record {n}", _mapping(record, f"{whole}, record {n}")) for n, record in enumerate(found)
        )


def _mapping(record: Any, where: str) -> dict[str, Any]:
    if isinstance(record, str):
        record = _json(record, where)
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a record in braces, found {type(record).__name__}")
    return record


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not valid JSON: {error}") from error


def _named(folder: Path, name: str) -> Path | None:
    """The picture a metadata record names, with its suffix or (kohya) without; never one outside the folder."""
    for candidate in (name, *(name + suffix for suffix in PICTURE_SUFFIXES)):
        path = folder / candidate
        inside = path.resolve().is_relative_to(folder.resolve())
        if inside and path.suffix.lower() in PICTURE_SUFFIXES and path.is_file():
            return folder / Path(os.path.normpath(candidate))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
