"""Swapping without packing: where all slots keep their shapes, an adapter's rows go over another's in one copy.

A bank is the slots that hold the same adapters, each at its old ranks. What an adapter puts on them is laid out once,
in the order of the slots; a swap then costs the copy and little else. An adapter that is alone lies in one memory for
all its layers: one large copy takes half the time of a thousand small ones here, and is one transfer to a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_diffusion.fitting import Fit, Site
from lora_diffusion.lora import Slot
from lora_diffusion.packing import Block, Memory, memory
from lora_diffusion.pairs import Pair
from lora_diffusion.resident import Met
from lora_diffusion.stacked import Stacked

_NAMES = ("down", "up")
_ALIGNED = 64  # bytes: where fresh memory begins, and so every part of a joined one

Writes = list[tuple[Sequence[Memory], Sequence[Memory]]]  # rows of slots, what goes there


@dataclass
class Column:
    """What one adapter puts on the slots of a bank, in their order."""

    blocks: list[Block]
    entries: list[tuple[str, int, float]]
    rows: Sequence[Memory]  # of `down` and of `up` as the slots have them, or all in one


class Bank:
    """Slots by their sites, with equally many low-rank adapters and nothing else on each of them."""

    def __init__(self, slots: Mapping[Site, Slot]) -> None:
        self.slots = dict(slots)
        self._packed = [slot.packed for slot in slots.values()]
        self._ranks = [[rank for _, rank in packed] for packed in zip(*self._packed, strict=True)]
        self._columns: WeakKeyDictionary[Met[Fit], dict[str, Column]] = WeakKeyDictionary()
        self._held: list[Column | None] = [None] * len(self._ranks)  # what is there, by place
        self._parameters = [vars(slot)["_parameters"] for slot in slots.values()]
        self._at: list[int] = []  # where those lay when their rows were taken
        self._rows: list[Sequence[Memory]] = []  # by place: what is written over
        held = self._held_rows()
        kinds = {(one.dtype, one.device) for one in held}
        alone = len(self._ranks) == len(kinds) == 1 and all(
            len(one) == rank for one, rank in zip(held, (r for r in self._ranks[0] for _ in _NAMES), strict=True)
        )
        self._joined = alone and not any(one.nbytes % _ALIGNED for one in held)

    @classmethod
    def of(cls, slots: Mapping[Site, Slot], count: int) -> Bank | None:
        """The bank of these slots with `count` adapters on each, if they make one."""
        alike = count and all(len(slot.packed) == count == len(slot.entries) for slot in slots.values())
        return cls(slots) if alike else None

    def holds(self, slots: Mapping[Site, Slot]) -> bool:
        """Whether it is the bank of these slots, and they are as it left them: nobody packed or moved them."""
        ours = self.slots
        return len(slots) == len(ours) and all(
            slots.get(site) is slot and slot.packed is packed
            for (site, slot), packed in zip(ours.items(), self._packed, strict=True)
        )

    def exchange(self, stacked: Sequence[Stacked], writes: Writes) -> bool:
        """Have the slots hold these adapters; what is to be copied is added to `writes`. The gates are to be set anew.

        False, and nothing is changed, where one is not known as low-rank pairs with the ranks of those it replaces.
        """
        if len(stacked) != len(self._ranks):
            return False
        found = [self._column(one, number) for number, one in enumerate(stacked)]
        columns = [column for column in found if column is not None]
        if len(columns) < len(found):
            return False
        rows = self._written()
        for number, column in enumerate(columns):
            if self._held[number] is not column and not self._is_there(number, column):
                writes.append((rows[number], column.rows))
        self._held = [*columns]
        self._packed = list(zip(*(column.blocks for column in columns), strict=True))
        entries = zip(*(column.entries for column in columns), strict=True)
        for slot, packed, pairs in zip(self.slots.values(), self._packed, entries, strict=True):
            slot.exchanged(packed, pairs)
        return True

    def _held_rows(self) -> list[Tensor]:
        return [held for of in self._parameters for name in _NAMES if (held := of[name]) is not None]

    def _written(self) -> Sequence[Sequence[Memory]]:
        """By place, its rows of `down` and of `up` on all slots, to be written over."""
        held = self._held_rows()
        at = [rows.data_ptr() for rows in held]
        if self._at != at:  # the first time, in a copy, or where somebody gave the parameters other memory
            with torch.inference_mode(mode=False):  # they are written to outside of one as well
                if self._joined:
                    whole, parts = joined([rows.data for rows in held])
                    for rows, part in zip(held, parts, strict=True):
                        rows.data = part
                    self._rows = [[memory(whole)]]
                else:
                    ranks = ([rank for _, rank in packed] for packed in self._packed for _ in _NAMES)
                    split = [rows.data[: sum(of)].split(of) for rows, of in zip(held, ranks, strict=True)]
                    self._rows = [[*map(memory, place)] for place in zip(*split, strict=True)]
            self._at = [rows.data_ptr() for rows in held]
        return self._rows

    def _is_there(self, number: int, column: Column) -> bool:
        return all(packed[number][0] is token for packed, (token, _) in zip(self._packed, column.blocks, strict=True))

    def _column(self, one: Stacked, number: int) -> Column | None:
        by_name = self._columns.setdefault(one.met, {})
        if (column := by_name.get(one.name)) is None:
            pairs = [pair for site in self.slots if (pair := one.known(site)) is not None]
            if [pair.rank for pair in pairs] != self._ranks[number]:
                return None
            rows = self._laid(pairs)
            column = Column([pair.block for pair in pairs], [pair.entry for pair in pairs], rows)
            by_name[one.name] = column
        return column if [rank for _, rank in column.blocks] == self._ranks[number] else None

    def _laid(self, pairs: Sequence[Pair]) -> Sequence[Memory]:
        """The rows of these pairs as they are copied to where the slots are."""
        named = [(pair, name) for pair in pairs for name in _NAMES]
        held = self._held_rows()
        rows = [pair.rows(name, here.dtype) for (pair, name), here in zip(named, held, strict=True)]
        if self._joined:
            whole, parts = joined(rows)
            for (pair, name), part in zip(named, parts, strict=True):
                pair.laid[name] = part  # there once
            return [memory(whole) if held[0].is_cpu else whole]
        return [
            memory(one) if here.is_cpu else one.view(len(one), *here.shape[1:])
            for one, here in zip(rows, held, strict=True)
        ]


def joined(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies of these one behind the other in one memory, and each of them there.

    None begins where the memory does: none would take what is behind it for room to grow into.
    """
    before = tensors[0].new_empty(_ALIGNED)
    whole = torch.cat([before, *(one.reshape(-1) for one in tensors)])[_ALIGNED:]
    parts = whole.split([one.numel() for one in tensors])
    return whole, [part.view_as(one) for part, one in zip(parts, tensors, strict=True)]
