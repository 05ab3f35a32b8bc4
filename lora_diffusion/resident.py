"""Adapters that a stack has met: read, checked and matched with the model once, then swapped in by copying rows.

Files are known by path, size and time; adapters by their object. A tensor that is written to in place makes its
adapter a new one the next time it is put on; while it is on, the stack may or may not read what was written: take it
off first. The content hash is taken where two adapters must be told apart, not to put one on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from lora_diffusion.adapter import Adapter
from lora_diffusion.formats.files import load_adapter
from lora_diffusion.pairs import Pair

Plan = TypeVar("Plan")


@dataclass(eq=False)
class Met(Generic[Plan]):
    """An adapter and what was planned for it."""

    adapter: Adapter  # held, so that its identity stays its own
    stamp: tuple[object, ...]
    plan: Plan
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)  # component, layer -> as slots take them

    @cached_property
    def bytes(self) -> int:
        """Of its layers' tensors."""
        return sum(tensor.nbytes for *_, layer in self.adapter for tensor in layer.tensors.values())

    @cached_property
    def key(self) -> str:
        """Its content hash, when it is first asked for."""
        return self.adapter.content_hash


class Residents(Generic[Plan]):
    """Known files and adapters, in the host's memory.

    `make` plans an adapter's place, or raises; it is told whether the values were checked when the file was read.
    Beyond `limit` bytes of tensors, those that were met longest ago are forgotten; to be met again they are read again.
    """

    def __init__(self, make: Callable[[Adapter, bool], Plan], limit: int = 8 * 2**30) -> None:
        self._make, self.limit = make, limit
        self._files: dict[tuple[Path, int, int, bool], Adapter] = {}
        self._met: dict[int, Met[Plan]] = {}

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

    def meet(self, adapter: Adapter) -> Met[Plan]:
        """An adapter with its plan; what `make` raises for one that does not fit."""
        stamp = _stamp(adapter)
        met = self._met.pop(id(adapter), None)
        if met is None or met.stamp != stamp:
            fresh = met is None and any(adapter is read for read in self._files.values())
            try:
                met = Met(adapter, stamp, self._make(adapter, fresh))
            except BaseException:
                self._forget_files(adapter)
                raise
        self._met[id(adapter)] = met  # last: they lie in the order they were met
        while len(self._met) > 1 and sum(met.bytes for met in self._met.values()) > self.limit:
            self._forget_files(self._met.pop(next(iter(self._met))).adapter)
        return met

    def _forget_files(self, adapter: Adapter) -> None:
        self._files = {facts: read for facts, read in self._files.items() if read is not adapter}


def _stamp(adapter: Adapter) -> tuple[object, ...]:
    """Changes when a layer is exchanged or a tensor is written to in place; those of inference mode do not say that."""
    layers = [layer for *_, layer in adapter]
    tensors = [tensor for layer in layers for tensor in layer.tensors.values()]
    tensors += [vectors for by_component in adapter.embeddings.values() for vectors in by_component.values()]
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    names = [name for of in (adapter.layers, *adapter.layers.values()) for name in of]
    return (*map(id, tensors), *versions, *names, *[layer.alpha for layer in layers])
