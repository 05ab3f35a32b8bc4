"""Tensors on disk under the hash of everything they depend on: picture, caption, model and settings.

    key = content_key(picture=info.content, view=view, model=fingerprint(vae))
    cache.fill({key: view, …}, encode)      # encodes what is missing, in batches
    latents = cache[key]["latents"]

A key that changes is a new file, so nothing stale is ever read. Files are written beside and renamed, carry the
hash of their own content, and are made again when that does not match.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_diffusion.errors import DataError

__all__ = ["TensorCache", "content_key"]

Entry = Mapping[str, Tensor]
T = TypeVar("T")
_HASH = "content"


def content_key(**parts: Any) -> str:
    """SHA-256 of named strings, numbers, sequences, mappings and dataclasses, whatever their order."""
    text = json.dumps(parts, sort_keys=True, default=_plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class TensorCache:
    """key -> named tensors on the CPU, on disk, with the most recently used ones in memory.

    `memory` is the bound in bytes on what is held in memory. Raises DataError where `folder` cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, memory: int = 256 * 2**20) -> None:
        self.folder = Path(folder)
        self.memory = memory
        self._held: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __getitem__(self, key: str) -> Entry:
        entry = self.get(key)
        if entry is None:
            raise KeyError(key)
        return entry

    def get(self, key: str) -> Entry | None:
        """The entry, or None where there is none or its file is damaged."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        entry = _read(self.path(key))
        if entry is not None:
            self._hold(key, entry)
        return entry

    def put(self, key: str, tensors: Entry) -> None:
        """Write an entry; it appears under its name when it is complete."""
        entry = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self.path(key)
        draft = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may make the same entry
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(entry, draft, metadata={_HASH: _hash(entry)})
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                draft.unlink()
            raise DataError(f"{path}: the cache cannot be written ({error}); is the disk full or read-only?") from error
        self._hold(key, entry)

    def fill(
        self,
        wanted: Mapping[str, T],
        make: Callable[[Sequence[T]], Sequence[Entry]],
        *,
        batch: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Make what is missing of `wanted` (key -> what `make` needs), `batch` at a time; how many were made.

        `progress(done, total)` counts all of `wanted`. Interrupted, the same call goes on where it stopped.
        """
        missing = [key for key in wanted if _read(self.path(key)) is None]
        for start in range(0, len(missing), batch):
            keys = missing[start : start + batch]
            made = make([wanted[key] for key in keys])
            for key, entry in zip(keys, made, strict=True):
                self.put(key, entry)
            if progress is not None:
                progress(len(wanted) - len(missing) + start + len(keys), len(wanted))
        return len(missing)

    def path(self, key: str) -> Path:
        """Where the entry is, or would be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def _hold(self, key: str, entry: Entry) -> None:
        if key in self._held:
            self._bytes -= _size(self._held.pop(key))
        self._held[key] = entry
        self._bytes += _size(entry)
        while self._bytes > self.memory and self._held:
            self._bytes -= _size(self._held.popitem(last=False)[1])


def _read(path: Path) -> Entry | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            claimed = (file.metadata() or {}).get(_HASH)
    except (OSError, SafetensorError):
        return None
    return entry if claimed == _hash(entry) else None


def _hash(entry: Entry) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(entry.items()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    raise TypeError(f"a cache key cannot hold a {type(value).__name__}")
