"""What a stack leaves on its models when nobody holds it any more: it acts on, and the next stack takes it off.

So `AdapterStack(pipe).add(file)` is enough to generate, and a notebook's cell that makes a stack can run again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_diffusion.dial import Dial
from lora_diffusion.fusing import Fusion
from lora_diffusion.layers import submodule
from lora_diffusion.lora import slot_of, take_off
from lora_diffusion.tokens import Vocabulary

_LEFT = "_left_adapters"


@dataclass
class _Left:
    """On one model. It refers to no model, so that those go when the pipeline does."""

    adapters: list[str]
    layers: list[str]
    hooks: Sequence[Any]
    kept: tuple[Any, Any] | None  # tokenizer and embedding weight as they were, where tokens came
    pipe: Callable[[], Any]  # whose tokenizer it is; None once that is gone
    fusion: Fusion | None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"pipe": _nobody}  # a copy is on another pipeline


def _nobody() -> None:
    return None


def leave(
    models: Mapping[str, nn.Module],
    dials: Mapping[str, Dial],
    adapters: Sequence[str],
    vocabulary: Vocabulary,
    fusion: Fusion | None,
) -> None:
    """Note on every model (by component) what a stack that goes leaves on it."""
    for component, model in models.items():
        dial, tokens = dials[component], vocabulary.kept.get(component)
        if dial.slots or tokens:
            pipe = weakref.ref(vocabulary.pipe)
            left = _Left(list(adapters), list(dial.slots), dial.hooks, tokens, pipe, fusion)
            vars(model).setdefault(_LEFT, []).append(left)


def take_off_left(models: Mapping[str, nn.Module], vocabulary: Vocabulary) -> list[str]:
    """Take off what was left on these models; names of the adapters. The pipeline is bit-identical to before them."""
    found = [(c, left) for c, model in models.items() for left in vars(model).pop(_LEFT, ())]
    kept: dict[str, tuple[Any, Any]] = {}
    for component, left in found:
        for name in left.layers:
            if slot_of(layer := submodule(models[component], name)) is not None:
                take_off(layer)
        for hook in left.hooks:
            hook.remove()
        if left.fusion is not None:
            left.fusion.undo()
        if left.kept and (component not in kept or len(left.kept[1]) < len(kept[component][1])):
            kept[component] = left.kept  # of several, the shortest is the pipeline's own
    vocabulary.restore(kept)
    for component, left in found:
        if left.kept:
            vocabulary.restore_tokenizer(left.pipe(), component, models[component])
    return list(dict.fromkeys(name for _, left in found for name in left.adapters))
