"""What a stack leaves on its models when nobody holds it any more: it acts on, and the next stack takes it off.

So `AdapterStack(pipe).add(file)` is enough to generate, and a notebook's cell that makes a stack can run again. A
pipeline that was copied without its stack carries what nobody holds too, and its first stack takes that off.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_diffusion.dial import Dial
from lora_diffusion.fusing import Fusion
from lora_diffusion.layers import submodule
from lora_diffusion.lora import Slot, slot_of, take_off
from lora_diffusion.tokens import Vocabulary, own_vocabulary

_LEFT = "_left_adapters"


@dataclass
class _Left:
    """On one model. It refers to no model, so that those go when the pipeline does."""

    adapters: list[str]
    layers: list[str]
    hooks: Sequence[Any]
    pipe: Callable[[], Any]  # whose tokenizer was extended; None once that is gone

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"pipe": _nobody}  # a copy is on another pipeline


def _nobody() -> None:
    return None


class Hold:
    """What a living stack holds: models by component, their dials, its tokens. A copy of the stack holds copies."""

    def __init__(self, models: Mapping[str, nn.Module], dials: Mapping[str, Dial], vocabulary: Vocabulary) -> None:
        self.models, self.dials, self.vocabulary = models, dials, vocabulary
        if any(hold.is_on(name, model) for hold in list(_LIVING) for name, model in models.items()):
            gc.collect()  # a stack that nobody holds may still live in a cycle of references
        _note_strays(models, dials)
        _LIVING.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _LIVING.add(self)

    def is_on(self, component: str, model: nn.Module) -> bool:
        """Whether slots or tokens of the stack are on a model: no more once it is cleared and released."""
        if self.models.get(component) is not model:
            return False
        return bool(self.dials[component].slots) or component in self.vocabulary.kept

    def leave(self, adapters: Sequence[str]) -> None:
        """Note on every model what a stack that goes leaves on it."""
        _LIVING.discard(self)
        for component, model in self.models.items():
            dial = self.dials[component]
            if self.is_on(component, model):
                left = _Left(list(adapters), list(dial.slots), dial.hooks, weakref.ref(self.vocabulary.pipe))
                vars(model).setdefault(_LEFT, []).append(left)

    def take_off_left(self) -> list[str]:
        """Take off what was left on these models; names of the adapters. The pipeline is bit-identical to before."""
        found = [(c, left) for c, model in self.models.items() for left in vars(model).pop(_LEFT, ())]
        fusions: dict[int, Fusion] = {}
        for component, left in found:
            for name in left.layers:
                if slot_of(layer := submodule(self.models[component], name)) is not None:
                    slot = take_off(layer)
                    fusions |= {id(slot.fusion): slot.fusion} if isinstance(slot.fusion, Fusion) else {}
            for hook in left.hooks:
                hook.remove()
        for fusion in fusions.values():
            fusion.undo()
        for component, left in found:
            self.vocabulary.restore_left(component, left.pipe())
        return list(dict.fromkeys(name for _, left in found for name in left.adapters))


_LIVING: weakref.WeakSet[Hold] = weakref.WeakSet()


def _note_strays(models: Mapping[str, nn.Module], dials: Mapping[str, Dial]) -> None:
    """Note what is on these models and was in no stack's hands ever: they are copies."""
    held = {id(slot) for hold in list(_LIVING) for dial in hold.dials.values() for slot in dial.slots.values()}
    known = {id(dial) for hold in list(_LIVING) for dial in hold.dials.values()}
    owned = {id(kept) for hold in list(_LIVING) for kept in hold.vocabulary.kept.values()}
    for component, model in models.items():
        if _LEFT in vars(model):
            continue
        strays = {n: slot for n, slot in _dialled(model).items() if id(slot) not in held}
        hooks = [hook for dial in _listening(dials[component].host) if id(dial) not in known for hook in dial.hooks]
        own = own_vocabulary(model)
        if strays or hooks or (own is not None and id(own) not in owned):
            names = list(dict.fromkeys(name for slot in strays.values() for name, _, _ in slot.entries))
            names = names or [f"tokens of {component}"] * (own is not None)
            vars(model)[_LEFT] = [_Left(names, list(strays), hooks, _nobody)]


def _dialled(model: nn.Module) -> dict[str, Slot]:
    """Slots of stacks by layer; those of a training have gates of their own."""
    found = ((name, slot_of(layer)) for name, layer in model.named_modules())
    return {name: slot for name, slot in found if slot is not None and slot.dialled}


def _listening(host: nn.Module) -> list[Dial]:
    """Dials that hear of a model's calls."""
    hooks = [*vars(host)["_forward_pre_hooks"].values(), *vars(host)["_forward_hooks"].values()]
    dials = [getattr(hook, "__self__", None) for hook in hooks]
    return [dial for dial in dials if isinstance(dial, Dial)]
