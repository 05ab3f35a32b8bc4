"""Swapping without packing: where all slots keep their shapes, an adapter's rows go over another's in one copy.

A bank is the slots that hold the same adapters, each at its old ranks. What an adapter puts on them is laid out once,
as lists in the order of the slots; a swap then costs the copy and little else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from lora_diffusion.fitting import Fit, Site
from lora_diffusion.lora import Slot
from lora_diffusion.packing import Block, Memory, memory
from lora_diffusion.pairs import Pair
from lora_diffusion.resident import Met
from lora_diffusion.stacked import Stacked

Writes = list[tuple[Sequence[Memory], Sequence[Memory]]]  # rows of slots, what goes there


@dataclass
class Column:
    """What one adapter puts on the slots of a bank, in their order."""

    blocks: list[Block]
    entries: list[tuple[str, int, float]]
    down: list[Memory]  # its rows as the slots have them
    up: list[Memory]


class Bank:
    """Slots by their sites, with equally many low-rank adapters and nothing else on each of them."""

    def __init__(self, slots: Mapping[Site, Slot]) -> None:
        self.slots = dict(slots)
        self._packed = [slot.packed for slot in slots.values()]
        self._ranks = [[rank for _, rank in packed] for packed in zip(*self._packed, strict=True)]
        self._columns: WeakKeyDictionary[Met[Fit], dict[str, Column]] = WeakKeyDictionary()
        self._held: list[Column | None] = [None] * len(self._ranks)  # what is there, by place

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
        views = [slot.split() for slot in self.slots.values()]
        for number, column in enumerate(columns):
            if self._held[number] is not column and not self._is_there(number, column):
                writes += (([of[number][0] for of in views], column.down), ([of[number][1] for of in views], column.up))
        self._held = [*columns]
        self._packed = list(zip(*(column.blocks for column in columns), strict=True))
        entries = zip(*(column.entries for column in columns), strict=True)
        for slot, packed, pairs in zip(self.slots.values(), self._packed, entries, strict=True):
            slot.exchanged(packed, pairs)
        return True

    def _is_there(self, number: int, column: Column) -> bool:
        return all(packed[number][0] is token for packed, (token, _) in zip(self._packed, column.blocks, strict=True))

    def _column(self, one: Stacked, number: int) -> Column | None:
        by_name = self._columns.setdefault(one.met, {})
        if (column := by_name.get(one.name)) is None:
            pairs = [pair for site in self.slots if (pair := one.known(site)) is not None]
            if [pair.rank for pair in pairs] != self._ranks[number]:
                return None
            slots = self.slots.values()
            down, up = (
                [_laid(pair, name, slot) for pair, slot in zip(pairs, slots, strict=True)] for name in ("down", "up")
            )
            column = Column([pair.block for pair in pairs], [pair.entry for pair in pairs], down, up)
            by_name[one.name] = column
        return column if [rank for _, rank in column.blocks] == self._ranks[number] else None


def _laid(pair: Pair, name: str, slot: Slot) -> Memory:
    """The rows of a pair in a slot's dtype, as they are copied to where the slot is."""
    held = slot.get_parameter(name)
    rows = pair.rows(name, held.dtype)
    return memory(rows) if held.is_cpu else rows.view(pair.rank, *held.shape[1:])
