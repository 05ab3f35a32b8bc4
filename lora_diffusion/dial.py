"""The gates of one component: one flat buffer of gains, rewritten before each denoiser call where a weight asks for it.

Every slot's gate is a slice of the buffer, so that changing all weights of a model is one multiplication:
gains = scales * numbers[owner]. Weights by image or place are built by the slot when its layer is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_diffusion.clock import Clock
from lora_diffusion.composing import Composition, alone, averaged, in_turn, members_of, repeated, shares_of
from lora_diffusion.errors import ConfigError
from lora_diffusion.gates import Call, Level, Resolved, entry_gate, has_places, is_live, is_steady, number_at
from lora_diffusion.gates.fading import Fading
from lora_diffusion.lora import Slot
from lora_diffusion.packing import unrecorded

_uncompiled: Any = torch.compiler.disable


@dataclass(slots=True)
class Entry:
    """One adapter on one layer."""

    name: str
    layer: str
    rank: int
    scale: float
    level: Level = 0.0
    fading: Fading | None = None  # a denoiser's rows that act by the noise


class Dial:
    """Levels of every adapter on every slot of one component; a denoiser's dial also listens to the clock."""

    def __init__(self, component: str, host: nn.Module, clock: Clock | None) -> None:
        self.component, self.host, self.clock = component, host, clock
        self.slots: dict[str, Slot] = {}
        self.entries: list[Entry] = []
        self.call = Call()
        self._by_layer: dict[str, range] = {}
        self._by_name: dict[str, list[int]] = {}
        self._numbers: list[float] = []
        self._scheduled: list[int] = []
        self._fading: list[int] = []  # entries whose rows act by the noise
        self.active: list[float] = [math.inf]  # how many rows of each entry do
        self._place = torch.zeros(0, dtype=torch.long)  # of each row among those of its entry
        with torch.inference_mode(mode=False):  # it is written to outside of one as well
            self._gains = torch.zeros(0)
        self._shared: list[tuple[Mapping[str, Tensor | None], Tensor]] = []  # slots' buffers, their part of the gains
        self._owner, self._scales = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        self.hooks: tuple[RemovableHandle, ...] = ()
        self._listening = (False, False)
        self._still = True  # every level is a number and they add up: nothing changes from call to call
        self.composition = Composition()
        self._order: list[str] = []  # adapters as they were added
        self._taking_part: list[str] = []  # those that are on, where they do not simply add up
        self._members: list[list[str]] = [[]]  # of them those in each image; once, where all have the same
        self._turns: tuple[str | None, ...] = (None,)  # the one that is on there in this step; None: all

    def bind(
        self,
        slots: Mapping[str, Slot],
        weights: Mapping[str, Resolved],
        composition: Composition | None = None,
        factors: Mapping[tuple[str, str], float] = MappingProxyType({}),
        fadings: Mapping[str, Fading] = MappingProxyType({}),
    ) -> None:
        """Take over the gates of these slots (layer name -> slot) at these weights (adapter -> levels).

        Only a denoiser's adapters are composed in any other way than by their sum. `factors` by (adapter, layer)
        stand beside the scales; 1 where there is none. `fadings` by adapter say which rows act at which noise.
        """
        self.slots, self._order = dict(slots), list(weights)
        self.composition = composition if composition is not None and self.clock is not None else Composition()
        self.entries, self._by_layer, self._by_name = [], {}, {}
        owner: list[int] = []
        rows: list[int] = []
        for layer, slot in slots.items():
            first, slot.live = len(self.entries), None
            self._by_layer[layer] = range(first, first + len(slot.entries))
            for number, (name, rank, scale) in enumerate(slot.entries, first):
                self.entries.append(Entry(name, layer, rank, scale * factors.get((name, layer), 1.0)))
                self._by_name.setdefault(name, []).append(number)
                owner.append(number)
                rows.append(rank)
            owner.append(-1)  # rows in reserve belong to the last number, which is 0
            rows.append(slot.rows - sum(rows[-len(slot.entries) :] if slot.entries else ()))
            if fadings and self.clock is not None:
                for entry in self.entries[first : first + len(slot.pairs)]:
                    entry.fading = fadings.get(entry.name)
        self._numbers = [0.0] * (len(self.entries) + 1)
        self._fading = [i for i, entry in enumerate(self.entries) if entry.fading is not None]
        self.active = [math.inf] * len(self._numbers)
        counts = torch.tensor(rows, dtype=torch.long)
        self._owner = torch.tensor(owner, dtype=torch.long).repeat_interleave(counts)
        self._place = torch.arange(len(self._owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        self._scales = torch.tensor([*(entry.scale for entry in self.entries), 0.0])[self._owner]
        self._scheduled, self._taking_part, self._members, self._turns = [], [], [[]], (None,)
        self._still = self.composition.mode == "sum" and not self._fading and self._listening == (False, False)
        self._share()
        self.turn(weights)

    def rebind(self, weights: Mapping[str, Resolved]) -> bool:
        """The same slots and ranks, other adapters: names, scales and levels anew. False where more has changed."""
        if not self._still:
            return False
        self._order, self._by_name = list(weights), {name: [] for name in weights}
        there = chain.from_iterable(slot.entries for slot in self.slots.values())
        for number, (entry, (name, _, scale)) in enumerate(zip(self.entries, there, strict=True)):
            entry.name, entry.scale = name, scale
            self._by_name[name].append(number)
        self._scales = torch.tensor([*(entry.scale for entry in self.entries), 0.0])[self._owner]
        self.turn(weights)
        return True

    def turn(self, weights: Mapping[str, Resolved]) -> None:
        """Set the levels of these adapters; the others keep theirs."""
        plain = {n: one.everywhere for n, one in weights.items() if isinstance(one.everywhere, float) and not one.sites}
        for name, resolved in weights.items():
            for number in self._by_name.get(name, ()):
                entry = self.entries[number]
                entry.level = resolved.at(self.component, entry.layer) if resolved.sites else resolved.everywhere
        if len(plain) == len(weights) and self._still:
            for name, level in plain.items():
                for number in self._by_name.get(name, ()):
                    self._numbers[number] = level
            self.write()
            return
        composed = self.composition.mode != "sum"
        self._members = members_of([(e.name, e.level) for e in self.entries], self._order) if composed else [[]]
        self._taking_part = [name for name in self._order if any(name in there for there in self._members)]
        self._turns = self.composition.turns(self._members, 0)
        for number, entry in enumerate(self.entries):
            if composed or entry.name in weights:
                self._numbers[number] = self._number(entry, 0.0)
        self._scheduled = [i for i, entry in enumerate(self.entries) if callable(entry.level)]
        for layer, slot in self.slots.items():
            slot.live = Builder(self, layer) if self._is_live(layer) else None
            slot.by_image = not any(has_places(self.entries[i].level) for i in self._by_layer[layer])
        self.write()
        changing = len(self._taking_part) > 1 or any(not isinstance(e.level, float) or e.fading for e in self.entries)
        repeating = self.composition.times(self._taking_part) > 1
        self._still = not composed and not changing
        self._listen(before=self.clock is not None and changing, after=repeating)

    def _number(self, entry: Entry, progress: float) -> float:
        return number_at(entry.level, progress) if {None, entry.name} & {*self._turns} else 0.0

    def _is_live(self, layer: str) -> bool:
        several = self.composition.times(self._taking_part) > 1 or len(self._members) > 1
        return (several and bool(self._by_layer[layer])) or any(
            is_live(self.entries[i].level) for i in self._by_layer[layer]
        )

    def entries_of(self, layer: str) -> range:
        """Indices of the entries on one layer."""
        return self._by_layer[layer]

    def _share(self) -> None:
        device = next((slot.down.device for slot in self.slots.values() if not slot.down.is_meta), None)
        with torch.inference_mode(mode=False):  # it is written to outside of one as well
            self._gains = torch.zeros(len(self._owner), device=device)
            gates = self._gains.split([slot.rows for slot in self.slots.values()])
        self._shared = [
            (slot.share(gate, self._numbers, self._by_layer[layer].start), gate)
            for (layer, slot), gate in zip(self.slots.items(), gates, strict=True)
        ]

    def write(self) -> None:
        """All gates at once, in place: no graph sees a new tensor."""
        if not all(buffers["gate"] is gate for buffers, gate in self._shared):
            self._share()  # the model was moved or cast in between
        gains = torch.tensor(self._numbers)[self._owner] * self._scales
        if self._fading:
            gains = gains * (self._place < torch.tensor(self.active)[self._owner])
        self._gains.copy_(gains)

    def wake(self) -> None:
        """Let slots that were fused into their weights act again."""
        for slot in self.slots.values():
            slot.fusion = None
        self.write()

    def _listen(self, *, before: bool, after: bool) -> None:
        """Hook the denoiser where something changes with its calls, and their outcome where it is a mean."""
        if (before, after) == self._listening:
            return
        for hook in self.hooks:
            hook.remove()
        hooks: list[RemovableHandle] = []
        if before:
            hooks.append(self.host.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True))
        if after:
            hooks.append(self.host.register_forward_hook(self.after))
        self.hooks, self._listening, self.call = tuple(hooks), (before, after), Call()

    @_uncompiled
    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the denoiser: what changes with the step gets its number for this call."""
        assert self.clock is not None
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        self.call = Call(self.clock.progress(timestep), *_geometry(model, args, kwargs))
        turns = self.composition.turns(self._members, self.clock.step)
        changing = range(len(self.entries)) if turns != self._turns else self._scheduled
        self._turns = turns
        for i in changing:
            self._numbers[i] = self._number(self.entries[i], self.call.progress)
        for i in self._fading:
            fading = self.entries[i].fading
            assert fading is not None
            self.active[i] = fading.active(self.entries[i].rank, self.clock.noise)
        if changing or self._fading:
            self.write()
        times, x = self.composition.times(self._taking_part), _sample(args, kwargs)
        if times > 1 and isinstance(x, Tensor):
            return repeated(args, len(x), times), repeated(kwargs, len(x), times)
        return None

    @_uncompiled
    def after(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Hook of the denoiser: the mean over what the adapters predict alone, where they are to do that."""
        times = self.composition.times(self._taking_part)
        return averaged(out, shares_of(self._taking_part, self._members)) if times > 1 else out

    def gate(self, entry: Entry, batch: int, shape: Sequence[int]) -> Tensor:
        """The number of one adapter at its layer in this call: (1 or batch, 1 or places, 1)."""
        times = self.composition.times(self._taking_part)
        if batch % times:
            raise ConfigError(f"composite of {times} adapters: {entry.layer!r} gets a batch of {batch}, no multiple")
        if not {None, entry.name} & {*self._turns} or (times > 1 and entry.name not in self._taking_part):
            return torch.zeros(1, 1, 1)
        level = in_turn(entry.level, entry.name, self._turns)
        gate = entry_gate(level, self.call, entry.layer, batch // times, shape) * entry.scale
        return gate if times == 1 else alone(gate, self._taking_part.index(entry.name), times, batch // times)


class Builder:
    """Makes the gates of one slot by image and place, for the call that its dial heard of. A copy is a copy's."""

    def __init__(self, dial: Dial, layer: str) -> None:
        self.dial, self.slot, self.numbers = dial, dial.slots[layer], dial.entries_of(layer)
        composed = dial.composition.mode != "sum"
        entries = [dial.entries[i] for i in self.numbers]
        self._steady = not composed and all(is_steady(e.level) and not e.fading for e in entries)
        self._known: dict[int, Tensor] = {}  # by the size of the batch, where nothing else changes it

    @_uncompiled
    def __call__(self, batch: int, shape: Sequence[int]) -> Tensor:
        """(1 or batch, 1 or places, R) at a layer whose input is (batch, *shape, features)."""
        if batch in self._known:
            return self._known[batch]
        with unrecorded():
            gate = self._built(batch, shape)
        if self._steady:
            self._known[batch] = gate
        return gate

    def _built(self, batch: int, shape: Sequence[int]) -> Tensor:
        entries = [self.dial.entries[i] for i in self.numbers]
        gates = [self.dial.gate(entry, batch, shape) for entry in entries]
        size = torch.broadcast_shapes(*(gate.shape for gate in gates))
        columns = [gate.expand(*size[:2], entry.rank) for gate, entry in zip(gates, entries, strict=True)]
        for i, number in enumerate(self.numbers):
            if self.dial.active[number] < entries[i].rank:
                columns[i] = columns[i] * (torch.arange(entries[i].rank) < self.dial.active[number])
        spare = torch.zeros(*size[:2], self.slot.rows - sum(e.rank for e in entries))
        return torch.cat([*columns, spare], dim=-1)


def _sample(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The latents of a denoiser call."""
    return args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))


def _geometry(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[int, int] | None, int]:
    """The latent grid (rows, columns) of a denoiser call, and its number of text tokens."""
    x = _sample(args, kwargs)
    text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
    tokens = text.shape[1] if isinstance(text, Tensor) and text.dim() == 3 else 0
    if isinstance(x, Tensor) and x.dim() == 4:
        return (x.shape[2], x.shape[3]), tokens
    if isinstance(ids := kwargs.get("img_ids"), Tensor):  # FLUX: (tokens, 3) of frame, row, column
        rows, columns = (int(n) + 1 for n in ids.reshape(-1, ids.shape[-1]).amax(0)[1:3])
        return (rows, columns), tokens
    if shapes := kwargs.get("img_shapes"):  # Qwen-Image: by image, (frames, rows, columns)
        first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        return (int(first[1]), int(first[2])), tokens
    return None, tokens
