"""READ FIRST: the formula and the slot. What one adapter adds to a layer is a low-rank pair (`pairs.py`).

A frozen layer W with adapters i = 1..N computes (Hu et al. 2021, arXiv 2106.09685, eq. 3, N times)

    y = W x + B diag(g) A x          A = rows of all A_i     `down` (R, in), R = sum of the ranks
                                     B = columns of all B_i  `up`   (R, out), stored row by rank
                                     g = weight_i * scale_i  `gate` (R,), scale = alpha / rank

            x ──┬── W (frozen, any precision) ──┬── y
                └── down ── · g ── up ──────────┘

All that can be turned while a pipeline runs is a value of g. One sum, two exact ways to compute it:

    branch            out + ((x downᵀ) · g) up            few tokens, 4-bit weights, training, gates per token
    transient merge   x (W + upᵀ diag(g) down)ᵀ           many tokens: T · (in + out) > in · out

What is no low-rank pair (DoRA, LoHa, OFT, …) is a branch of its own in the same slot, with its own number in g:
see `branches.py`.

A `Slot` is a child module `adapters` of the frozen layer plus two hooks on it. The layer keeps its class,
its weights and whatever else patches its `forward`; taking the slot off leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_diffusion.branches import Branch, add_branches, first_input
from lora_diffusion.dropping import Dropping
from lora_diffusion.layers import compute_dtype, convolution_arguments, core, frozen_weight, kernel_shape, out_width
from lora_diffusion.packing import Block, repacked, unrecorded
from lora_diffusion.pairs import Pair
from lora_diffusion.products import add_convolution, add_linear, add_trained, merged_by_image, merging_pays, over_pixels

SLOT = "adapters"  # name of the child module on a frozen layer
#: what a slot keeps that is neither tensor nor module: set past nn.Module's search for those, ten times as fast
_PLAIN = {"dialled", "fusion"} | frozenset(
    "by_image convolution entries first hooks kept live moved numbers packed pairs reserve rows".split()  # noqa: SIM905
)

Part = Pair | Branch


class Slot(nn.Module):
    """What sits on one frozen layer: the packed pairs of every adapter on it, the branches, and their gate."""

    down: nn.Parameter  # (R, in[, kh, kw])
    up: nn.Parameter  # (R, out)
    gate: Tensor  # float32: (R,), (batch, 1, R) or (batch, tokens, R)
    branches: nn.ModuleList | tuple[nn.Module, ...]
    dropping: Dropping | None = None  # random gates, while training
    hooks: tuple[RemovableHandle, ...] = ()
    live: Callable[[int, Sequence[int]], Tensor] | None = None  # batch, places -> gate by image and place
    by_image = False  # the live gate has no places: it is (1 or batch, 1, R)
    packed: tuple[Block, ...] = ()  # whose rows are in `down` and `up`, as they were written
    moved = False  # moved or cast, perhaps rounded, since all was written
    fusion: object = None  # by which it is in the weight: the layer is left alone, whatever the weights
    dialled = False  # its gate is one of a dial's
    numbers: Sequence[float] = ()  # weights by entry; a dial's slots share one list, theirs from `first` on
    first = 0

    def __init__(
        self,
        layer: nn.Module,
        parts: Sequence[Part],
        *,
        trainable: bool = False,
        reserve: int = 0,
        gated: bool = True,
    ) -> None:
        """`gated` False: the gate comes later, from a dial that has those of all slots in one buffer."""
        super().__init__()
        self.convolution = convolution_arguments(layer)
        self.kept: list[Tensor] = []  # the frozen weight while a merged one stands in for it
        self.reserve = reserve  # rows held at least, so that swapping within them changes no shape
        vars(self)["branches"] = ()
        self.register_buffer("gate", None, persistent=False)
        self.pack(layer, parts, trainable=trainable)
        if gated:
            self.weigh({})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def pack(self, layer: nn.Module, parts: Sequence[Part], *, trainable: bool = False) -> None:
        """Hold these parts and no others; trainable ones in float32, in the memory that a pair has where that fits. The
        gate is to be set anew.

        Rows that are there already stay or move; rows beyond all, up to `reserve`, are zero. Tensors of the right
        shape are written in place.
        """
        weight = frozen_weight(inner := core(layer))
        dtype = torch.float32 if trainable else compute_dtype(inner)
        device = torch.device("cpu") if weight.is_meta else weight.device  # meta: offloaded between calls
        pairs = [part for part in parts if isinstance(part, Pair)]
        blocks = [pair.block for pair in pairs]
        rows = max(sum(rank for _, rank in blocks), self.reserve)
        kernel, width = (kernel_shape(layer), out_width(layer)) if rows else ((0,), 0)  # norms, attentions: no rows
        before, self.packed, self.moved = self.packed, (), True  # written anew where this fails
        with unrecorded():
            for name, shape in (("down", (rows, *kernel)), ("up", (rows, width))):
                old, kind = self._parameters.get(name), (dtype, device)
                held = None if old is None else old.data
                packed = repacked(held, shape, kind, before, blocks, lambda i, n=name: pairs[i].rows(n), take=trainable)
                if held is None or not held.is_set_to(packed):
                    self._parameters[name] = nn.Parameter(packed, requires_grad=trainable and rows > 0)
        self.packed = () if trainable else tuple(blocks)
        self.pairs = tuple(pair.entry for pair in pairs)
        branches = [part for part in parts if isinstance(part, Branch)]
        if branches or self.branches:
            self.branches = nn.ModuleList(branch.hold(device, dtype, trainable=trainable) for branch in branches)
        self.entries = (*self.pairs, *((branch.name, 1, 1.0) for branch in branches))
        self.rows, self.moved = rows + len(branches), False

    def exchanged(self, packed: tuple[Block, ...], pairs: tuple[tuple[str, int, float], ...]) -> None:
        """Note that others of the same ranks were written over the packed ones."""
        held = vars(self)  # past `__setattr__`: there are many slots
        held["packed"], held["entries"], held["pairs"] = packed, pairs, pairs

    @property
    def weights(self) -> tuple[float, ...]:
        """One number an entry."""
        return tuple(self.numbers[self.first : self.first + len(self.entries)])

    @property
    def idle(self) -> bool:
        """Whether the layer is left alone, bit for bit."""
        return self.fusion is not None or not any(self.weights)

    def share(self, gate: Tensor, numbers: Sequence[float], first: int) -> Mapping[str, Tensor | None]:
        """Take a gate that lies in a larger buffer, and weights in a longer list, as a dial has them for all slots.

        Returns the buffers, whose "gate" is another tensor once the model was moved or cast.
        """
        self._buffers["gate"], self.numbers, self.first, self.dialled = gate, numbers, first, True
        return self._buffers

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Set the gate from one number an adapter (1 where none is given)."""
        self.numbers, self.first = [weights.get(name, 1.0) for name, _, _ in self.entries], 0
        ranks = [rank for _, rank, _ in self.entries]
        gains = [w * scale for w, (_, _, scale) in zip(self.numbers, self.entries, strict=True)]
        repeats = torch.tensor([*ranks, self.rows - sum(ranks)])  # the last: rows in reserve
        self.gate = torch.tensor([*gains, 0.0]).repeat_interleave(repeats).to(self.down.device)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """`out` (the frozen layer's output for `x`) with all pairs added."""
        gate = self._of_pairs(self._gate(out))
        if self.training and self.dropping:
            gate = self.dropping.rows(gate.to(x.device), x.shape[0], (1,) if self.convolution else x.shape[1:-1])
        if self.convolution is not None:
            return add_convolution(x, out, self.down, self.up, gate, self.convolution)
        if torch.is_grad_enabled() and (x.requires_grad or self.up.requires_grad):
            return add_trained(x, out, self.down, self.up, gate)
        return add_linear(x, out, self.down.to(x), self.up.to(x), gate)

    def merged(self, weight: Tensor) -> Tensor:
        """weight + upᵀ diag(gate) down, rounded once, in the weight's dtype and shape. Branches are not in it."""
        columns = (self.up.t() * self._of_pairs(self.gate)).to(weight.dtype)
        if weight[0].numel() >= 16 * len(self.up):  # below, turning them costs more than the product gains by it
            columns = columns.contiguous()
        return torch.addmm(weight.flatten(1), columns, self.down.flatten(1).to(weight.dtype)).view_as(weight)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook: where merging pays, let the merged weight stand in for the frozen one during this call."""
        if torch.compiler.is_compiling():
            return  # and no guard on what changes with the weights
        self.put_back(layer)
        if not self.idle and self._merging_pays(layer, x := first_input(args, kwargs)):
            gate = None if self.live is None else self.live(len(x), x.shape[1:-1]).expand(len(x), -1, -1)
            self.kept.append(weight := frozen_weight(layer))
            merged = self.merged(weight) if gate is None else merged_by_image(weight, self.down, self.up, gate)
            layer._parameters["weight"] = merged  # type: ignore[assignment]

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Hook, called even when the layer raised: put the frozen weight back, or add the branch."""
        if self.put_back(layer) or out is None or (not torch.compiler.is_compiling() and self.idle):
            return out  # compiled code adds zero where it is idle
        if isinstance(out, tuple):  # joint attention: the picture's tokens, then the text's
            return (self.after(layer, args, kwargs, out[0]), *out[1:])
        x = first_input(args, kwargs)
        if self.branches:  # first: they need the base output, to which pairs may be added in place
            out = add_branches(self._turned(out), layer, x, out)
        return self(x, out) if len(self.down) else out

    def put_back(self, layer: nn.Module) -> bool:
        """The frozen weight, where a merged one stands in for it: still does after an interrupt, which runs no hook."""
        if stood_in := bool(self.kept):
            layer._parameters["weight"] = self.kept.pop()  # type: ignore[assignment]
        return stood_in

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for weight in self.kept:  # after an interrupt: the layer's own is saved, not what stands in for it
            destination[f"{prefix.removesuffix(f'{SLOT}.')}weight"] = weight if keep_vars else weight.detach()

    def extra_repr(self) -> str:
        """`'style' rank 16 at 0.8, …`"""
        kinds = [*(f"rank {rank}" for _, rank, _ in self.pairs), *(type(b).__name__ for b in self.branches)]
        rows = zip(self.entries, kinds, self.weights, strict=True)
        return ", ".join(f"{name!r} {kind} at {weight:g}" for (name, _, _), kind, weight in rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        self.packed, self.moved = (), True  # the next time all is written again
        for weight in self.kept:
            weight.data = fn(weight.data)
        gate = self._buffers["gate"]
        super()._apply(fn, recurse)
        if gate is not None and self.gate.dtype != gate.dtype:
            self.gate = gate.to(self.gate.device)  # float32 in a model of any precision
        return self

    def _turned(self, out: Tensor) -> list[tuple[Branch, Tensor]]:
        """Every branch that is on, with its number in the gate, shaped to multiply its output."""
        gate, first, weights = self._gate(out), len(self.pairs), self.weights
        column = sum(rank for _, rank, _ in self.pairs)
        on: list[tuple[Branch, Tensor]] = []
        for i, branch in enumerate(self.branches):
            assert isinstance(branch, Branch)
            if torch.compiler.is_compiling() or weights[first + i]:
                gain = gate[..., column + i : column + i + 1].to(out.device)
                if self.training and self.dropping:
                    gain = gain * self.dropping.whole(out.device)
                flat = self.convolution is None or gain.dim() == 1
                on.append((branch, gain if flat else over_pixels(gain, out)))
        return on

    def _gate(self, out: Tensor) -> Tensor:
        return self.gate if self.live is None else self._by_place(out)

    def _of_pairs(self, gate: Tensor) -> Tensor:
        if not self.branches:
            return gate
        first = sum(rank for _, rank, _ in self.pairs)  # read here only: no compiled graph depends on what is packed
        return torch.cat([gate[..., :first], gate[..., first + len(self.branches) :]], dim=-1)

    def _by_place(self, out: Tensor) -> Tensor:
        assert self.live is not None
        places = out.shape[2:] if self.convolution is not None else out.shape[1:-1]
        gate = self.live(out.shape[0], places)  # (1 or batch, 1 or places, R)
        if self.convolution is not None or len(places) == 1:
            return gate
        return gate.unflatten(1, places if gate.shape[1] > 1 else (1,) * len(places)) if places else gate[:, 0]

    def _merging_pays(self, layer: nn.Module, x: Tensor) -> bool:
        how = self.convolution
        if torch.is_grad_enabled() or self.gate.dim() > 1 or self.branches:
            return False  # branches need the base output
        if self.live is not None:  # by image, of linear layers alone; by place no weight can be merged
            return self.by_image and how is None and x.dim() == 3 and merging_pays(layer, x, x.shape[1], weights=len(x))
        tokens = x.numel() // x.shape[-1] if how is None else x[:, 0].numel() // math.prod(how["stride"])
        return merging_pays(layer, x, tokens)


def place(layer: nn.Module, slot: Slot) -> None:
    """Put `slot` on `layer`: a child module and two hooks."""
    if slot_of(layer) is not None or hasattr(layer, SLOT):
        raise RuntimeError(f"{type(layer).__name__} has something called {SLOT!r} already")
    layer.add_module(SLOT, slot)
    slot.hooks = (
        layer.register_forward_pre_hook(slot.before, with_kwargs=True),
        layer.register_forward_hook(slot.after, with_kwargs=True, always_call=True),
    )


def take_off(layer: nn.Module) -> Slot:
    """Remove the layer's slot and return it; hooks and module tree are as before it came."""
    slot = slot_of(layer)
    assert slot is not None
    slot.put_back(layer)
    delattr(layer, SLOT)
    for hook in slot.hooks:
        hook.remove()
    slot.hooks = ()
    return slot


def slot_of(layer: nn.Module) -> Slot | None:
    """The slot on a layer, if there is one."""
    return slot if isinstance(slot := vars(layer)["_modules"].get(SLOT), Slot) else None
