"""What methods are registered, plugins included, and how many numbers each would train on a model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import nn

from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.layers import is_attention, is_norm, weight_shape
from lora_diffusion.methods import METHODS, Method, new_method
from lora_diffusion.targets import Targets, find_targets

ELSEWHERE = ("conv", "norm", "attention-blocks")  # where methods are counted that linear layers do not take
LARGEST = 1024  # rank that is looked at to make parameters equal


@dataclass(frozen=True)
class MethodRow:
    """One registered method. `parameters` is None without a model, and where it is on no layer or has no such rank.

    `targets` is what they are counted on: other layers than the others' where the method is defined on none of those.
    """

    name: str
    about: str
    tensors: tuple[str, ...]
    parameters: int | None = None
    targets: Targets = ""


def registered(model: nn.Module | None = None, targets: Targets = "attention", rank: int = 16) -> list[MethodRow]:
    """Every method, in the registry's order. `model` may be on the meta device; TargetError for unmatched targets."""
    return [_row(name, model, targets, rank) for name in METHODS]


def _row(name: str, model: nn.Module | None, targets: Targets, rank: int) -> MethodRow:
    about, tensors = _about(METHODS[name]), tuple(METHODS[name].tensors)
    if model is None:
        return MethodRow(name, about, tensors)
    layers = list(find_targets(model, targets).values())
    try:
        counted = count_parameters(name, layers, rank)
    except ConfigError:  # a rank that one of the layers cannot have
        return MethodRow(name, about, tensors, None, targets)
    for other in ELSEWHERE if counted is None else ():
        try:
            counted = count_parameters(name, list(find_targets(model, other).values()), rank)
        except (TargetError, ConfigError):
            continue
        if counted is not None:
            return MethodRow(name, about, tensors, counted, other)
    return MethodRow(name, about, tensors, counted, targets)


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
    sizes: dict[object, int] = {}  # by the weight's shape and whether there is a bias: a model has few
    total = 0
    for layer in fitting:
        kind = (
            layer
            if is_norm(layer) or is_attention(layer)
            else (*weight_shape(layer), getattr(layer, "bias", None) is None)
        )
        if kind not in sizes:
            fresh = method.fresh(_like(layer))
            frozen = getattr(method, "frozen", ())
            trained = [t for key, t in fresh.tensors.items() if t.is_floating_point() and key not in frozen]
            sizes[kind] = sum(tensor.numel() for tensor in trained)
        total += sizes[kind]
    return total if fitting else None


def nearest_rank(
    name: str, layers: Sequence[nn.Module], wanted: int, settings: Mapping[str, object] | None = None
) -> int:
    """The rank, up to 1024, at which a method trains about `wanted` numbers: doubled until passed, then halved to."""

    def count(rank: int) -> int:
        try:
            return count_parameters(name, layers, rank, settings) or 0
        except ConfigError:  # a rank beyond the smallest layer
            return sys.maxsize

    low, high = 1, 1
    while high < LARGEST and count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return min((low, high), key=lambda rank: abs(count(rank) - wanted))


def _like(layer: nn.Module) -> nn.Module:
    """A real layer of the same sides: fresh tensors may need its weight, and else its shape alone."""
    if is_norm(layer) or is_attention(layer):
        return layer
    out, width, *kernel = weight_shape(layer)
    bias = getattr(layer, "bias", None) is not None
    if not kernel:
        return nn.Linear(width, out, bias=bias)
    if len(kernel) == 3:
        return nn.Conv3d(width, out, (kernel[0], kernel[1], kernel[2]), bias=bias)
    return nn.Conv2d(width, out, (kernel[0], kernel[1]), bias=bias)
