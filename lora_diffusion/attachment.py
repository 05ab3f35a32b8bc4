"""Put trainable slots on a model and take them off: the low level, to train by hand.

attachment = attach(unet, LoRA(rank=16), targets="attention")
optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-4)
...
save_adapter(attachment.adapter("my style"), "style.safetensors")
attachment.detach()
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.branches import Branch
from lora_diffusion.dropping import Dropping
from lora_diffusion.errors import AdapterMismatchError, ConfigError, TargetError, some
from lora_diffusion.gates.fading import Fading
from lora_diffusion.lora import Part, Slot, place, slot_of, take_off
from lora_diffusion.methods import METHODS, Course, Method, outline, resumed, written
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.methods.starts import StartBranch, difference, first_half
from lora_diffusion.packing import uncollected
from lora_diffusion.pairs import Pair
from lora_diffusion.products import pair_norm
from lora_diffusion.targets import Targets, find_targets

NAME = "training"  # what a slot calls the adapter that is being trained
START = "start"  # and where it began, taken off again


class Attachment:
    """Trainable slots on one model. Everything else of the model is frozen until `detach`."""

    def __init__(
        self,
        model: nn.Module,
        component: str,
        slots: dict[str, Slot],
        fresh: dict[str, LayerAdapter],
        away: dict[str, LayerAdapter],
    ) -> None:
        self.model, self.component, self.slots = model, component, slots
        self._fresh = {name: outline(one) for name, one in fresh.items()}  # what the slots were made of
        self._starts = away  # those of them that are pairs away from 0
        self.course: Course | None = None
        self.fading: Fading | None = None  # what acts at which noise, as T-LoRA asks for
        self._was_trainable = [p for p in model.parameters() if p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, float32, in the model's order: `down` and `up`, or what the method names its own."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("<layer>.down", parameter) and so on, by the method's tensor names."""
        for name, slot in self.slots.items():
            for key, parameter in _held(slot).items():
                if parameter.requires_grad:
                    yield f"{name}.{key}", parameter

    def groups(self, lr: float, up_ratio: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser; LoRA+ gives `up` a higher rate, `up_ratio` · lr, such as 16.

        Hayou et al. 2024, arXiv 2402.12354. "ratio" in each group is the factor that its rate has.
        """
        ups = [p for name, p in self.named_parameters() if name.endswith(".up")]
        others = [p for name, p in self.named_parameters() if not name.endswith(".up")]
        if up_ratio == 1.0 or not ups:
            return [{"params": self.parameters(), "lr": lr, "ratio": 1.0}]
        faster = {"params": ups, "lr": lr * up_ratio, "ratio": up_ratio}
        return [{"params": others, "lr": lr, "ratio": 1.0}, faster]

    def begin(self, method: Method, steps: int) -> None:
        """Set `course`, what the method does beside the optimiser in a run of `steps`; most do nothing."""
        begin, layers = getattr(method, "course", None), {name: _held(slot) for name, slot in self.slots.items()}
        self.course = None if begin is None else begin(layers, steps)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the parameters, and what the course keeps."""
        parameters = {name: p.detach() for name, p in self.named_parameters()}
        return parameters | (self.course.state() if self.course else {})

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])
        if self.course:
            self.course.restore(state)

    def at(self, noise: Tensor) -> None:
        """Tell what fades the noise of each picture of the next call: (batch,), from 0 for none to 1."""
        branches = [branch for slot in self.slots.values() for branch in slot.branches] if self.fading else []
        for fade in filter(None, (getattr(branch, "fade", None) for branch in branches)):
            fade(self.fading, noise)

    def weigh(self, weight: float) -> None:
        """Turn what is being trained to another strength; 0 makes the model its own frozen teacher."""
        for slot in self.slots.values():
            slot.weigh({NAME: weight, START: weight})

    @property
    def has_cap(self) -> bool:
        """Whether `cap` means something: every layer has a pair, and it began at 0."""
        return not self._starts and all(slot.pairs for slot in self.slots.values())

    def cap(self, limit: float) -> int:
        """Scale every pair whose delta has a Frobenius norm above `limit` down to it; how many there were.

        Each factor takes the root of the ratio, as kohya's `scale_weight_norms` does.
        """
        capped = 0
        with torch.no_grad():
            for slot in self.slots.values():
                for _, _, scale in slot.pairs:
                    norm = pair_norm(slot.down, slot.up, scale)
                    if norm > limit:
                        slot.down.mul_(math.sqrt(limit / norm))
                        slot.up.mul_(math.sqrt(limit / norm))
                        capped += 1
        return capped

    def adapter(self, name: str, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """A copy of the trained tensors in the neutral form.

        Layers that began away from 0 are given as what training added, a pair of twice the rank, so that they fit the
        base as it is; AdaLoRA's as plain LoRA with the ranks that are left.
        """
        layers = {layer: _layer_adapter(slot, self._fresh[layer]) for layer, slot in self.slots.items()}
        for layer, start in self._starts.items():
            layers[layer] = difference(layers[layer], start)
        cast = {layer: one.cast(dtype) for layer, one in written(layers).items()}
        said = self.fading.metadata() if self.fading else {}
        return Adapter(name, {self.component: cast}, metadata=said)

    def load(self, adapter: Adapter) -> None:
        """Copy an adapter's tensors into the slots. AdapterMismatchError unless layers and shapes are the same."""
        theirs = resumed(adapter.layers.get(self.component, {}), self._fresh)
        for name in self._starts.keys() & theirs.keys():
            theirs[name] = first_half(theirs[name]) if theirs[name].method == "lora" else theirs[name]
        if theirs.keys() != self.slots.keys():
            odd = sorted(theirs.keys() ^ self.slots.keys())
            raise AdapterMismatchError(
                f"adapter {adapter.name!r} and the model differ in {self.component}: {some(odd)}"
            )
        with torch.no_grad():
            for name, slot in self.slots.items():
                _copy(slot, theirs[name], self._fresh[name], f"adapter {adapter.name!r}: {self.component} {name}")

    def detach(self) -> None:
        """Take every slot off; module tree, hooks and `requires_grad` flags are as before `attach`."""
        for layer in self._layers().values():
            take_off(layer)
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        self.slots = {}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Attachment({self.component}: {len(self.slots)} layers, {count:,} trainable parameters)"

    def _layers(self) -> dict[str, nn.Module]:
        return {name: self.model.get_submodule(name) for name in self.slots}


@uncollected()
def attach(
    model: nn.Module,
    method: Method | None = None,
    targets: Targets = "attention",
    *,
    component: str = "unet",
    dropout: float | Dropping = 0.0,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    fresh: Mapping[str, LayerAdapter] | None = None,
    generator: torch.Generator | None = None,
) -> Attachment:
    """Freeze `model` and put fresh trainable slots on its target layers; nothing it computes changes.

    `dropout` is a probability on the rank axis, or several. `ranks` and `alphas` give layers by glob what the method
    gives the others; the last glob that matches counts. `fresh` gives layers their tensors, such as those of
    `beginning.py`, which may begin away from 0. Raises TargetError for an unmatched target or glob and for a layer
    that has a slot already; then nothing has changed.
    """
    method = LoRA() if method is None else method
    layers = find_targets(model, targets)
    if taken := [name for name, layer in layers.items() if slot_of(layer) is not None]:
        raise TargetError(f"{some(taken)} of {type(model).__name__} carry adapters already; take them off first")
    if unfit := [name for name, layer in layers.items() if not method.supports(layer)]:
        raise TargetError(f"method {method.name!r} is not defined on {some(unfit)} of {type(model).__name__}")
    if spanning := getattr(method, "spanning", None):  # what layers share depends on all of them
        method = cast("Method", spanning(layers.values()))
    methods = by_layer(method, layers, ranks or {}, alphas or {})
    given = fresh or {}
    new = {n: given[n] if n in given else methods[n].fresh(layer, generator) for n, layer in layers.items()}
    away = {name: one for name, one in new.items() if _begins_away(one, None if name in given else methods[name])}
    begun = away.keys() - given.keys()
    whole = {n: one.copy() if n in away or n in given else one for n, one in new.items()}  # to be trained in
    parts = {name: _parts(method, whole[name], layer, take_off_start=name in begun) for name, layer in layers.items()}
    dropping = dropout if isinstance(dropout, Dropping) else Dropping(token=dropout)
    if dropping.by_row and any(isinstance(part[0], Branch) for part in parts.values()):
        raise ConfigError(f"method {method.name!r}: dropout is {dropout}, but it has no rank axis to drop from")
    slots = {name: Slot(layers[name], part, trainable=True) for name, part in parts.items()}
    attachment = Attachment(model, component, slots, new, away)
    attachment.fading = getattr(method, "fading", None)
    model.requires_grad_(False)
    for name, slot in slots.items():
        slot.dropping = dropping if dropping != Dropping() else None
        for key in getattr(method, "frozen", ()):
            _held(slot)[key].requires_grad_(False)
        place(layers[name], slot)
    return attachment


def by_layer(
    method: Method, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Method]:
    """The settings of every layer. TargetError for a glob without layers, ConfigError for a method without ranks."""
    chosen = dict.fromkeys(layers, method)
    for setting, table in (("rank", ranks), ("alpha", alphas)):
        if table and setting not in {field.name for field in fields(cast("Any", method))}:
            raise ConfigError(f"method {method.name!r} has no {setting}, which {some(table)} would have by layer")
        for glob, value in table.items():
            if not (names := [name for name in layers if fnmatchcase(name, glob)]):
                raise TargetError(
                    f"{setting} of {glob!r}: no target layer is called so; there are {some(list(layers))}"
                )
            chosen |= {name: replace(cast("Any", chosen[name]), **{setting: value}) for name in names}
    return chosen


def _begins_away(new: LayerAdapter, method: Method | None) -> bool:
    zero = getattr(method, "begins_at_zero", False)  # else it is looked at
    return new.method == "lora" and not zero and bool(new.tensors["up"].any())


def _parts(method: Method, new: LayerAdapter, layer: nn.Module, *, take_off_start: bool) -> list[Part]:
    part = type(method).part(NAME, new, layer)
    if take_off_start and isinstance(part, Pair):
        return [part, StartBranch(START, new.tensors, part.scale)]
    return [part]


def fault_of(adapter: LayerAdapter, layer: nn.Module) -> str | None:
    """What does not fit, as a sentence (unknown method, missing or foreign tensors, wrong shapes); None if it fits."""
    if adapter.method not in METHODS:
        return f"the method {adapter.method!r} cannot be put on a model; there are {', '.join(METHODS)}"
    method = METHODS[adapter.method]
    if missing := [key for key, required in method.tensors.items() if required and key not in adapter.tensors]:
        return f"{some(missing)} missing from the {adapter.method} tensors"
    if extra := [key for key in adapter.tensors if key not in method.tensors]:
        return f"{some(extra)} not among the {adapter.method} tensors"
    if not method.supports(layer):
        return f"a {type(layer).__name__} takes no {adapter.method}"
    return method.check(adapter, layer)


def _held(slot: Slot) -> dict[str, nn.Parameter]:
    """The tensors of a slot with one part in it, by the method's names; `up` lies as the slot packs it."""
    if slot.pairs:
        return {"down": slot.down, "up": slot.up}
    (branch,) = slot.branches
    assert isinstance(branch, Branch)
    return dict(branch.held.items())


def _copy(slot: Slot, adapter: LayerAdapter, fresh: LayerAdapter, who: str) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in fresh.tensors.items()}
    if shapes != {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}:
        found = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in adapter.tensors.items())
        raise AdapterMismatchError(f"{who}: found {adapter.method} with {found}; expected {fresh.method} with {shapes}")
    for key, parameter in _held(slot).items():
        tensor = adapter.tensors[key]
        packed = tensor.flatten(1).t() if slot.pairs and key == "up" else tensor
        if not tensor.is_floating_point() and not torch.equal(tensor, fresh.tensors[key]):  # a setting, never trained
            raise AdapterMismatchError(f"{who}: {key} is {tensor.tolist()}; expected {fresh.tensors[key].tolist()}")
        parameter.copy_(packed.reshape(parameter.shape))


def _layer_adapter(slot: Slot, fresh: LayerAdapter) -> LayerAdapter:
    tensors: dict[str, Tensor] = {}
    for key, parameter in _held(slot).items():
        tensor = parameter.detach().t() if slot.pairs and key == "up" else parameter.detach()
        tensors[key] = tensor.reshape(fresh.tensors[key].shape).to("cpu", copy=True).contiguous()
    return replace(fresh, tensors=tensors)
