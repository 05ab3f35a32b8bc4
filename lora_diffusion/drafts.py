"""Files and folders that are there whole or not at all: written beside under another name, synced, then renamed.

    with whole_file(path) as draft:
        draft.write_text(...)            # OSError passes through; `path` is then what it was

Whatever breaks off, an interrupt too, the draft goes and what was there before stays. What a killed process left is
cleared by the next that writes the same name, once nobody has touched it for an hour.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"  # what drafts end in
ABANDONED = 3_600  # seconds without a change after which nobody writes a draft any more


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """An empty file beside `path`, which takes its place and has a new file's permissions when all is written."""
    prefix = _prefix(path)
    clear_abandoned(path.parent, prefix)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=PART)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        _settle(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """An empty folder beside `path`, which takes its place when all is written; a folder that was there goes then."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = _prefix(path)
    clear_abandoned(path.parent, prefix)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=PART))
    try:
        yield draft
        for found in [*draft.rglob("*"), draft]:
            _sync_folder(found) if found.is_dir() else _settle(found)
        draft.chmod(0o777 & ~_umask())
        _exchange(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _sync_folder(path.parent)


def clear_abandoned(folder: Path, prefix: str, age: float = ABANDONED) -> None:
    """Delete drafts in `folder` called `prefix`… that nobody has changed for `age` seconds."""
    with suppress(OSError), os.scandir(folder) as entries:
        old = [
            entry
            for entry in entries
            if entry.name.startswith(prefix)
            and entry.name.endswith(PART)
            and time.time() - entry.stat(follow_symlinks=False).st_mtime > age
        ]
        for entry in old:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                Path(entry).unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."


def _exchange(draft: Path, path: Path) -> None:
    """Give `draft` the name `path`; a folder of that name comes back where that fails, and is gone otherwise."""
    old = draft.with_suffix(".old")
    try:
        if path.exists():
            path.rename(old)
        draft.rename(path)
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(path)


def _settle(file: Path) -> None:
    """Flush a file to the disk, with the permissions of any new file: drafts and safetensors' files are private."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o666 & ~_umask())


def _sync_folder(path: Path) -> None:
    """Make renames in it last; a system that cannot open or sync folders has nothing to do."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
