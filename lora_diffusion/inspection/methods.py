"""What methods are registered, plugins included, and how many numbers each would train on a model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import nn

from lora_diffusion.layers import kernel_shape, weight_shape
from lora_diffusion.methods import METHODS, Method, new_method
from lora_diffusion.targets import Targets, find_targets


@dataclass(frozen=True)
class MethodRow:
    """One registered method. `parameters` is None without a model and where no target takes the method."""

    name: str
    about: str
    tensors: tuple[str, ...]
    parameters: int | None = None


def registered(model: nn.Module | None = None, targets: Targets = "attention", rank: int = 16) -> list[MethodRow]:
    """Every method, in the registry's order. `model` may be on the meta device; TargetError for unmatched targets."""
    layers = list(find_targets(model, targets).values()) if model is not None else []
    return [
        MethodRow(name, _about(METHODS[name]), tuple(METHODS[name].tensors), count_parameters(name, layers, rank))
        for name in METHODS
    ]


def _about(method: type[Method]) -> str:
    """The first line of the docstring of the module it is in."""
    text = inspect.getdoc(sys.modules[method.__module__]) or inspect.getdoc(method) or ""
    return text.split("\n", 1)[0]


def has_rank(name: str) -> bool:
    """Whether a method has a rank to choose."""
    return "rank" in {field.name for field in fields(cast("Any", METHODS[name]))}


def count_parameters(
    name: str, layers: Sequence[nn.Module], rank: int, settings: Mapping[str, object] | None = None
) -> int | None:
    """How many numbers a method trains on those of the layers that it is defined on; None where it is on none."""
    method = new_method(name, settings, rank=rank)
    fitting = [layer for layer in layers if method.supports(layer)]
    sizes: dict[tuple[int, ...], int] = {}  # by the weight's shape: a model has few
    for layer in fitting:
        if weight_shape(layer) not in sizes:
            fresh = method.fresh(_like(layer))
            frozen = getattr(method, "frozen", ())
            trained = [t for key, t in fresh.tensors.items() if t.is_floating_point() and key not in frozen]
            sizes[weight_shape(layer)] = sum(tensor.numel() for tensor in trained)
    return sum(sizes[weight_shape(layer)] for layer in fitting) if fitting else None


def _like(layer: nn.Module) -> nn.Module:
    """A real layer of the same sides: fresh tensors may need its weight."""
    out, width, *kernel = weight_shape(layer)
    if not kernel:
        return nn.Linear(width, out, bias=False)
    return nn.Conv2d(width, out, (kernel_shape(layer)[1], kernel_shape(layer)[2]), bias=False)
