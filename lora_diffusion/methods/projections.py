"""The random pair that all layers of a VeRA share: made from a seed, never trained, one copy on each device.

A (rank, widest in) and B (widest out, rank), for the widest layer; another takes its first columns of A and its first
rows of B. As PEFT makes them, to the bit: A drawn before B on the CPU, uniform in ±√(6 / numbers in a row).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Stored = tuple[int, int, int]  # seed, widest out, widest in

_WIDEST = 1 << 17  # a file that names wider sides is not believed: they would be allocated


@dataclass(frozen=True, eq=False)
class Projections:
    """A and B."""

    A: Tensor
    B: Tensor


_SHARED: WeakValueDictionary[tuple[Stored, int, torch.device, torch.dtype], Projections] = WeakValueDictionary()


def projections(stored: Stored, rank: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Projections:
    """The pair that `stored` names; the one that is there already while anything holds it."""
    key = (stored, rank, device, dtype)
    found = _SHARED.get(key)
    if found is None:
        seed, out, width = stored
        generator = torch.Generator().manual_seed(seed)
        A = _drawn(rank, width, generator).to(device, dtype)
        found = _SHARED[key] = Projections(A, _drawn(out, rank, generator).to(device, dtype))
    return found


def read(stored: Tensor) -> Stored:
    """The three numbers of a file's `projection`."""
    seed, out, width = (int(number) for number in stored.tolist())
    return seed, out, width


def fault_of(stored: Tensor, sides: Sequence[int]) -> str | None:
    """None where `stored` names a pair that reaches over a layer of these sides (out, in), else what is wrong."""
    numbers, limit = stored.tolist(), (_WIDEST, _WIDEST)
    if stored.shape != (3,) or stored.is_floating_point() or numbers[0] < 0:
        return f"projection {numbers}; expected three whole numbers: seed, widest out, widest in"
    if all(side <= widest <= _WIDEST for side, widest in zip(sides, numbers[1:], strict=True)):
        return None
    return f"projection of sides {tuple(numbers[1:])}; expected {tuple(sides)} or more, up to {limit}"


def _drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
