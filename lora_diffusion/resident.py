"""Adapters that a stack has met: read, checked and matched with the model once, then swapped in by copying rows.

Files are known by path, size and time; adapters by content hash, taken once an object. A tensor that is written to in
place makes its adapter a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lora_diffusion.adapter import Adapter
from lora_diffusion.formats.files import load_adapter

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Met(Generic[Plan]):
    """An adapter, its content hash and what was planned for it."""

    adapter: Adapter  # held, so that its identity stays its own
    stamp: tuple[int, ...]
    key: str
    plan: Plan


class Residents(Generic[Plan]):
    """Known files and adapters, in the host's memory. `make` plans an adapter's place, or raises."""

    def __init__(self, make: Callable[[Adapter], Plan]) -> None:
        self._make = make
        self._files: dict[tuple[Path, int, int, bool], Adapter] = {}
        self._met: dict[int, Met[Plan]] = {}
        self._plans: dict[str, Plan] = {}

    def read(self, adapter: Adapter | str | Path, *, strict: bool = True) -> Adapter:
        """The adapter of a file, read once while the file stays the same. AdapterFileError for a bad one."""
        if isinstance(adapter, Adapter):
            return adapter
        path = Path(adapter)
        if not path.is_file():
            return load_adapter(path, strict=strict)
        facts = path.stat()
        known = (path.resolve(), facts.st_size, facts.st_mtime_ns, strict)
        if known not in self._files:
            self._files[known] = load_adapter(path, strict=strict)
        return self._files[known]

    def plan(self, adapter: Adapter) -> tuple[str, Plan]:
        """(content hash, plan) of an adapter; what `make` raises for one that does not fit."""
        stamp = _stamp(adapter)
        met = self._met.get(id(adapter))
        if met is None or met.stamp != stamp:
            key = adapter.content_hash
            if key not in self._plans:
                self._plans[key] = self._make(adapter)
            met = self._met[id(adapter)] = Met(adapter, stamp, key, self._plans[key])
        return met.key, met.plan

    def forget(self) -> None:
        """Let the host's memory go."""
        self._files.clear()
        self._met.clear()
        self._plans.clear()


def _stamp(adapter: Adapter) -> tuple[int, ...]:
    """Changes when a layer is exchanged or a tensor is written to in place."""
    tensors = [tensor for *_, layer in adapter for tensor in layer.tensors.values()]
    tensors += [vectors for by_component in adapter.embeddings.values() for vectors in by_component.values()]
    alphas = [hash((component, name, layer.alpha)) for component, name, layer in adapter]
    return (*map(id, tensors), *(tensor._version for tensor in tensors), *alphas)
