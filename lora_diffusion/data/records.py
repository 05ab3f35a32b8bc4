"""Captions in JSON: records of `metadata.jsonl` and `metadata.json`, and text files as they are read anywhere here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_diffusion.errors import DataError

__all__ = ["TEXT_KEYS", "mapping", "read_text", "records"]

#: what a record calls its caption, the first that is there
TEXT_KEYS = ("text", "caption", "tags")


def records(folder: Path) -> Iterator[tuple[str, Path, object]]:
    """(where, folder, record) of a folder's metadata, as it is: text of a line, or JSON's own types.

    A file that cannot be read at all is a record that is a DataError. `metadata.json` is a list, or kohya's mapping
    from file names.
    """
    lines, whole = folder / "metadata.jsonl", folder / "metadata.json"
    for path, read in ((lines, _of_lines), (whole, _of_whole)):
        if not path.is_file():
            continue
        try:
            yield from ((where, folder, record) for where, record in read(path))
        except DataError as error:
            yield str(path), folder, error


def mapping(record: object, where: str) -> dict[str, Any]:
    """A record in braces, from its text or ready. DataError for anything else."""
    if isinstance(record, DataError):
        raise record
    found = _json(record, where) if isinstance(record, str) else record
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a record in braces, found {type(found).__name__}")
    return found  # pyright: ignore[reportUnknownVariableType]  # JSON has no other keys than strings


def read_text(path: Path) -> str:
    """UTF-8 with or without its mark. DataError for another encoding and for what cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _of_lines(path: Path) -> list[tuple[str, object]]:
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(f"{path}, line {number}", text) for number, text in lines if text.strip()]


def _of_whole(path: Path) -> list[tuple[str, object]]:
    found = _json(read_text(path), str(path))
    if isinstance(found, dict):
        found = [{"file_name": name, **record} for name, record in found.items() if isinstance(record, dict)]
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of records or a mapping from file names to records")
    return [(f"{path}, record {number}", record) for number, record in enumerate(found)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not valid JSON: {error}") from error
