"""The gates of one component: one flat buffer of gains, rewritten before each denoiser call where a weight asks for it.

Every slot's gate is a slice of the buffer, so that changing all weights of a model is one multiplication:
gains = scales * numbers[owner]. Weights by image or place are built by the slot when its layer is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_diffusion.clock import Clock
from lora_diffusion.gates import Call, Level, Resolved, entry_gate, is_live, number_at
from lora_diffusion.lora import Slot


@dataclass
class Entry:
    """One adapter on one layer."""

    name: str
    layer: str
    rank: int
    scale: float
    level: Level = 0.0


class Dial:
    """Levels of every adapter on every slot of one component; a denoiser's dial also listens to the clock."""

    def __init__(self, component: str, host: nn.Module, clock: Clock | None) -> None:
        self.component, self.host, self.clock = component, host, clock
        self.slots: dict[str, Slot] = {}
        self.entries: list[Entry] = []
        self.call = Call()
        self._by_layer: dict[str, list[int]] = {}
        self._numbers: list[float] = []
        self._scheduled: list[int] = []
        self._gains = torch.zeros(0)
        self._owner, self._scales = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        self._hook: RemovableHandle | None = None

    def bind(self, slots: Mapping[str, Slot], weights: Mapping[str, Resolved]) -> None:
        """Take over the gates of these slots (layer name -> slot) at these weights (adapter -> levels)."""
        self.slots = dict(slots)
        self.entries, self._by_layer = [], {}
        owner: list[int] = []
        for layer, slot in slots.items():
            first = len(self.entries)
            self.entries += [Entry(name, layer, rank, scale) for name, rank, scale in slot.entries]
            self._by_layer[layer] = list(range(first, len(self.entries)))
            ranks = [rank for _, rank, _ in slot.entries]
            owner += [first + i for i, rank in enumerate(ranks) for _ in range(rank)]
            owner += [-1] * (slot.rows - sum(ranks))  # rows in reserve belong to the last number, which is 0
        self._numbers = [0.0] * (len(self.entries) + 1)
        self._owner = torch.tensor(owner, dtype=torch.long)
        self._scales = torch.tensor([*(entry.scale for entry in self.entries), 0.0])[self._owner]
        self._share()
        self.turn(weights)

    def turn(self, weights: Mapping[str, Resolved]) -> None:
        """Set the levels of these adapters; the others keep theirs."""
        for number, entry in enumerate(self.entries):
            if entry.name in weights:
                entry.level = weights[entry.name].at(self.component, entry.layer)
                self._numbers[number] = number_at(entry.level, 0.0)
        self._scheduled = [i for i, entry in enumerate(self.entries) if callable(entry.level)]
        for layer, slot in self.slots.items():
            slot.live = self._builder(layer) if self._is_live(layer) else None
        self._write()
        self._listen(self.clock is not None and any(not isinstance(e.level, float) for e in self.entries))

    def _is_live(self, layer: str) -> bool:
        return any(is_live(self.entries[i].level) for i in self._by_layer[layer])

    def _share(self) -> None:
        device = next((slot.down.device for slot in self.slots.values()), None)
        self._gains = torch.zeros(len(self._owner), device=device)
        start = 0
        for slot in self.slots.values():
            slot.gate = self._gains[start : start + slot.rows]
            start += slot.rows

    def _write(self) -> None:
        """All gates at once, in place: no graph sees a new tensor."""
        if any(slot.gate._base is not self._gains for slot in self.slots.values()):
            self._share()  # the model was moved or cast in between
        self._gains.copy_(torch.tensor(self._numbers)[self._owner] * self._scales)
        for layer, slot in self.slots.items():
            numbers = tuple(self._numbers[i] for i in self._by_layer[layer])
            slot.weights = numbers
            slot.idle = not any(numbers)

    def _listen(self, wanted: bool) -> None:
        if wanted and self._hook is None:
            before: Any = torch.compiler.disable(self.before)
            self._hook = self.host.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        elif not wanted and self._hook is not None:
            self._hook.remove()
            self._hook, self.call = None, Call()

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the denoiser: what is scheduled gets its number for this call."""
        assert self.clock is not None
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        self.call = Call(self.clock.progress(timestep), *_geometry(model, args, kwargs))
        for i in self._scheduled:
            self._numbers[i] = number_at(self.entries[i].level, self.call.progress)
        if self._scheduled:
            self._write()

    def _builder(self, layer: str) -> Callable[[int, Sequence[int]], Tensor]:
        entries, slot = [self.entries[i] for i in self._by_layer[layer]], self.slots[layer]

        def build(batch: int, shape: Sequence[int]) -> Tensor:
            gates = [entry_gate(e.level, self.call, layer, batch, shape) * e.scale for e in entries]
            size = torch.broadcast_shapes(*(gate.shape for gate in gates))
            columns = [g.expand(*size[:2], e.rank) for g, e in zip(gates, entries, strict=True)]
            spare = torch.zeros(*size[:2], slot.rows - sum(e.rank for e in entries))
            return torch.cat([*columns, spare], dim=-1).to(slot.down.device)

        return build


def _geometry(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[int, int] | None, int]:
    """The latent grid (rows, columns) of a denoiser call, and its number of text tokens."""
    x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
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
