"""Pictures with their captions, masks, repeats and weights, from the spellings people use.

a folder    pictures, each with `name.txt`, `name.caption` or `name.json` (with `text` or `caption`) beside it,
            or `metadata.jsonl` / `metadata.json` with `file_name` and `text` (or `caption`)
sub-folder  like its parent; one called `10_sks dog` (kohya) repeats its pictures ten times, and captions
            those that have no caption of their own with `sks dog`
masks       `masks/name.png` in the same folder, or `name.mask.png` beside the picture
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from unicodedata import category

from lora_diffusion.data.records import TEXT_KEYS, mapping, read_text, records
from lora_diffusion.errors import ConfigError, DataError, in_lines

__all__ = ["PICTURE_SUFFIXES", "CaptionFrom", "Example", "Found", "Source", "find_examples", "look_for"]

#: file names that count as pictures, lower case
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

#: file names of pictures that cannot be read, and are said to be there
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".psd", ".xcf", ".kra", ".svg"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)

CaptionFrom = Literal["files", "filename"]

_MASKS = "masks"
_REPEATS = re.compile(r"(\d+)_(.*)")
_BARE = "has no caption"


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


@dataclass(frozen=True)
class Found:
    """What is in the folders: examples, pictures that cannot be one and why, and other faults, by their own path."""

    examples: Sequence[Example]
    bad: Mapping[Path, str]
    others: Mapping[Path | str, str]

    def fault(self, bad: Mapping[Path, str], advice: str) -> DataError:
        """One error that lists everything, more `bad` pictures included."""
        bad = {**self.bad, **bad}
        total = len({*self.bad, *(example.picture for example in self.examples)})
        said = [f"{len(bad)} of {total} pictures cannot be used"] if bad else []
        said += [f"{len(self.others)} metadata records or masks cannot be used"] if self.others else []
        if any(why.endswith(_BARE) for why in bad.values()):
            advice += "; for captions put a .txt file beside each, or set data.fallback_caption or "
            advice += "data.caption_from=filename"
        return DataError(f"{' and '.join(said)}; {advice}:{in_lines([*bad.values(), *self.others.values()], 1000)}")


def find_examples(
    sources: Sequence[Source] | str | os.PathLike[str],
    *,
    caption_from: CaptionFrom = "files",
    fallback_caption: str | None = None,
) -> list[Example]:
    """`look_for`, where every picture must be an example: else DataError lists all faults."""
    found = look_for(sources, caption_from=caption_from, fallback_caption=fallback_caption)
    if found.bad or found.others:
        raise found.fault({}, "repair or remove them")
    return list(found.examples)


def look_for(
    sources: Sequence[Source] | str | os.PathLike[str],
    *,
    caption_from: CaptionFrom = "files",
    fallback_caption: str | None = None,
) -> Found:
    """Every picture below the folders, sorted by path within each; a single folder may be given as its path.

    With `caption_from="filename"` the caption is the file's name, `red_fox-2.png` -> "red fox 2". Otherwise metadata
    wins over a caption file, which wins over the name of a kohya folder, which wins over `fallback_caption`. What is
    nothing but punctuation is no caption. Faults are of pictures without a caption or of a format that is not read,
    of metadata that cannot be read or names files that are not there, and of masks without a picture.

    Raises DataError for a missing folder and one without pictures; ConfigError for a wrong setting.
    """
    if caption_from not in get_args(CaptionFrom):
        raise ConfigError(f"caption_from is {caption_from!r}; expected 'files' or 'filename'")
    if isinstance(sources, str | os.PathLike):
        sources = [Source(Path(sources))]
    examples: list[Example] = []
    bad: dict[Path, str] = {}
    others: dict[Path | str, str] = {}
    for source in sources:
        pictures, masks, unread = _files(source)
        bad |= {path: f"{path}: is of a format that is not read; save it as PNG or JPEG" for path in unread}
        folders = sorted({source.folder, *(picture.parent for picture in pictures)})
        captions = dict[Path, str]() if caption_from == "filename" else _metadata(folders, others)
        for picture in pictures:
            try:
                caption = _caption(picture, source.folder, captions, caption_from) or fallback_caption
            except DataError as error:
                bad[picture] = str(error)
                continue
            if caption is None:
                bad[picture] = f"{picture}: {_BARE}"
                continue
            share = source.weight * source.repeats * _repeats(picture.parent, source.folder)
            examples.append(Example(picture, caption, share, _mask_of(picture), source.regularisation))
        used = {_mask_of(picture) for picture in pictures}
        others |= {
            mask: f"{mask}: is the mask of no picture here; it is called as its picture is, and is a .png"
            for mask in masks
            if mask not in used
        }
    return Found(examples, bad, others)


def _files(source: Source) -> tuple[list[Path], list[Path], list[Path]]:
    """(pictures, masks, pictures that cannot be read) below a source's folder, each sorted."""
    if source.repeats < 1 or source.weight <= 0:
        raise ConfigError(f"{source.folder}: repeats {source.repeats} and weight {source.weight} must be above zero")
    if not source.folder.is_dir():
        found = "is a file" if source.folder.exists() else "does not exist"
        raise DataError(f"{source.folder}: {found}; expected a folder of pictures")
    paths = sorted(_walk(source.folder, ()))
    masks, others = list[Path](), list[Path]()
    for path in paths:
        is_mask = _MASKS in path.relative_to(source.folder).parts[:-1] or path.stem.endswith(".mask")
        (masks if is_mask else others).append(path)
    pictures, masks = ([p for p in group if p.suffix.lower() in PICTURE_SUFFIXES] for group in (others, masks))
    unread = [path for path in others if path.suffix.lower() in UNREAD_SUFFIXES]
    if not pictures and not unread:
        raise DataError(f"{source.folder}: holds no pictures; looked for {', '.join(PICTURE_SUFFIXES)} here and below")
    return pictures, masks, unread


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Files here and below. Links are followed, but not back to a folder that they are in."""
    here = folder.resolve()
    try:
        inside = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    for path in inside:
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in (*above, here):
            yield from _walk(path, (*above, here))


def _caption(picture: Path, root: Path, metadata: Mapping[Path, str], caption_from: CaptionFrom) -> str | None:
    if caption_from == "filename":
        return re.sub(r"[\s_\-]+", " ", picture.stem).strip()
    found = (metadata.get(picture), _beside(picture), _kohya_name(picture.parent, root))
    return next((text for text in found if text and _says_something(text)), None)


def _says_something(text: str) -> bool:
    """Whether there is more in it than punctuation, spaces and control characters."""
    return any(category(letter)[0] not in "PZC" for letter in text)


def _beside(picture: Path) -> str | None:
    """The caption file's text on one line; None where there is none or it is empty."""
    for suffix in (".txt", ".caption"):
        path = picture.with_suffix(suffix)
        if path.is_file():
            return " ".join(read_text(path).split()) or None
    path = picture.with_suffix(".json")
    if not path.is_file() or path.name == "metadata.json":
        return None
    record = mapping(read_text(path), str(path))
    found = next((record[key] for key in TEXT_KEYS if key in record), None)
    text = ", ".join(map(str, found)) if isinstance(found, list) else found
    if not isinstance(text, str):
        raise DataError(f"{path}: expected 'text' or 'caption', found {sorted(record)}")
    return " ".join(text.split()) or None


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


def _metadata(folders: Sequence[Path], faults: dict[Path | str, str]) -> dict[Path, str]:
    """Captions of pictures by the metadata of these folders; what cannot be used goes into `faults`."""
    captions: dict[Path, str] = {}
    for where, inside, record in (found for folder in folders for found in records(folder)):
        try:
            path, text = _named_in(record, where, inside)
            if captions.get(path, text) != text:
                raise DataError(f"{where}: gives {path.name!r} a second caption")
            captions[path] = text
        except DataError as error:
            faults[where] = str(error)
    return captions


def _named_in(record: object, where: str, folder: Path) -> tuple[Path, str]:
    """The picture and the caption of a metadata record. DataError for one that has not both."""
    known = mapping(record, where)
    name, text = known.get("file_name"), next((known[key] for key in TEXT_KEYS if key in known), None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise DataError(f"{where}: expected 'file_name' and 'text' (or 'caption'), found {sorted(known)}")
    path = _named(folder, name)
    if path is None:
        raise DataError(f"{where}: names {name!r}, which is no picture in {folder}")
    return path, text.strip()


def _named(folder: Path, name: str) -> Path | None:
    """The picture a metadata record names, with its suffix or (kohya) without; never one outside the folder."""
    for candidate in (name, *(name + suffix for suffix in PICTURE_SUFFIXES)):
        path = folder / candidate
        inside = path.resolve().is_relative_to(folder.resolve())
        if inside and path.suffix.lower() in PICTURE_SUFFIXES and path.is_file():
            return folder / Path(os.path.normpath(candidate))
    return None
