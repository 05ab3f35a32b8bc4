"""Rows of many adapters in one tensor, in one order while adapters come and go.

A new adapter's rows are written where they belong and the rows behind them moved; nobody else's are read or rounded
again. Adding the n-th so costs its own rows and, at worst, one copy of those already there in the layer's dtype.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

Block = tuple[object, int]  # whose rows (by identity), how many
_NARROW = 32  # columns of a matrix up to which numpy transposes it in about half of torch's time
_AS_WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16


@dataclass(frozen=True)
class Arrangement:
    """From one list of blocks to another: runs of rows to keep, and where the blocks that are new begin."""

    kept: list[tuple[int, int, int]] = field(default_factory=list)  # from, to, rows; in an order safe to do in place
    new: dict[int, int] = field(default_factory=dict)  # index of the wanted block -> its first row


def arrange(held: Sequence[Block], wanted: Sequence[Block]) -> Arrangement:
    """How `held` rows become `wanted` ones. Blocks in both that changed places are written again, as all others are.

    A block may come more than once, where one adapter is on under two names: it is kept once and else written.
    """
    first, old = 0, dict[int, int]()
    for token, rows in held:
        old[id(token)], first = first, first + rows
    known = [old[one] for one in dict.fromkeys(id(token) for token, _ in wanted) if one in old]
    if known != sorted(known):
        old = {}
    runs: list[tuple[int, int, int]] = []
    to, new = 0, dict[int, int]()
    for index, (token, rows) in enumerate(wanted):
        was = old.pop(id(token), None)
        if was is None:
            new[index] = to
        elif runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (was, to):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + rows)
        else:
            runs.append((was, to, rows))
        to += rows
    nearer = [run for run in runs if run[1] <= run[0]]  # these never meet the others: the order is one and the same
    return Arrangement([*nearer, *(run for run in reversed(runs) if run[1] > run[0])], new)


def repacked(
    held: Tensor | None,
    shape: tuple[int, ...],
    kind: tuple[torch.dtype, torch.device],
    before: Sequence[Block],
    blocks: Sequence[Block],
    rows_of: Callable[[int], Tensor],
    *,
    take: bool = False,
) -> Tensor:
    """A tensor of `shape` (rows, …) with these blocks and zeros behind; `held`, of the same `kind`, has those before.

    `rows_of` gives the rows of a block by its index, and is asked for new ones alone. The tensor lies in the memory of
    `held` where that has room, else in new memory with room for half as much again. `take`: a block that is alone may
    give its own memory, to be trained in.
    """
    if held is None and len(blocks) == 1 and blocks[0][1] == shape[0]:  # most slots, when they come
        rows = rows_of(0).reshape(shape)
        if take and (rows.dtype, rows.device) == kind and rows.is_contiguous() and not rows.is_inference():
            return rows.detach()
        return _write(torch.empty(shape, dtype=kind[0], device=kind[1]), rows)
    fits = held is not None and (held.dtype, held.device, held.shape[1:]) == (*kind, shape[1:])
    arrangement = arrange(before if fits else (), blocks)
    packed = _moved(held if fits else None, shape, kind, arrangement.kept)
    for index, start in arrangement.new.items():
        _write(packed[start : start + blocks[index][1]], rows_of(index).reshape(-1, *shape[1:]))
    if (filled := sum(rows for _, rows in blocks)) < shape[0]:
        packed[filled:] = 0
    return packed


Memory = Tensor | NDArray[numpy.uint8]


def memory(tensor: Tensor) -> Memory:
    """What `write_all` writes to or reads from: a contiguous tensor, or its bytes where those are the host's.

    numpy copies bytes in about 0.6 of the time that torch takes for numbers.
    """
    if not tensor.is_cpu or not tensor.is_contiguous():
        return tensor
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def write_all(writes: Sequence[tuple[Sequence[Memory], Sequence[Memory]]]) -> None:
    """(rows, what goes there) for many layers, each of them in many parts, as one operation a device."""
    to, source = list[Tensor](), list[Tensor]()
    for pairs in writes:
        for rows, new in zip(*pairs, strict=True):
            if isinstance(rows, Tensor):
                assert isinstance(new, Tensor)
                to.append(rows)
                source.append(new)
            else:
                numpy.copyto(rows, new)
    if to:
        torch._foreach_copy_(to, source)  # pyright: ignore[reportPrivateUsage], torch's optimisers are made of it


@contextmanager
def unrecorded() -> Generator[None]:
    """Ordinary tensors, made without gradients; costs little where that is so already, as it is around many slots."""
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
    else:
        with torch.inference_mode(mode=False), torch.no_grad():
            yield


@contextmanager
def uncollected() -> Generator[None]:
    """No garbage collection meanwhile: thousands of small objects come that all stay, and each pass would look at
    everything in the process, 0.3 s and more where large libraries are loaded."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _write(rows: Tensor, source: Tensor) -> Tensor:
    """`rows` with the numbers of `source`, in the dtype and on the device of `rows`."""
    narrow = source.dim() == 2 and len(source) <= _NARROW and source.stride(0) == 1
    whole = _AS_WHOLE_NUMBERS.get(rows.element_size())
    if not narrow or whole is None or rows.dtype != source.dtype or not rows.is_cpu or not source.is_cpu:
        return rows.copy_(source)
    numpy.copyto(rows.view(whole).numpy(), source.detach().view(whole).numpy())
    return rows


def _moved(
    held: Tensor | None, shape: tuple[int, ...], kind: tuple[torch.dtype, torch.device], kept: Sequence[Sequence[int]]
) -> Tensor:
    room = None if held is None else _room(held, shape[0], ours=bool(kept))
    if room is None:
        spare = shape[0] // 2 if kept else 0
        room = torch.empty((shape[0] + spare, *shape[1:]), dtype=kind[0], device=kind[1])
        if held is not None:
            for start, to, rows in kept:
                room[to : to + rows] = held[start : start + rows]
    else:
        for start, to, rows in kept:
            _shift(room, start, to, rows)
    return room[: shape[0]]


def _shift(room: Tensor, start: int, to: int, rows: int) -> None:
    """Move rows within a tensor, in pieces that do not overlap with their place: no second copy of them is made."""
    step = abs(to - start)
    pieces = range(0, rows, step) if step else ()
    for first in pieces if to < start else reversed(pieces):
        last = min(first + step, rows)
        room[to + first : to + last] = room[start + first : start + last]


def _room(held: Tensor, rows: int, *, ours: bool) -> Tensor | None:
    """`held` with at least so many rows in its own memory, or None where that has too few or twice too many."""
    if rows == len(held):
        return held
    all_rows, width = max(rows, len(held)), held.stride(0) * held.element_size()
    capacity = held.untyped_storage().nbytes() // width if ours and width and not held.storage_offset() else 0
    if not all_rows <= capacity <= 2 * rows:
        return None
    view: Any = held.new_empty(0)  # no stub knows that `set_` takes an untyped storage
    return view.set_(held.untyped_storage(), 0, (all_rows, *held.shape[1:]))
