"""Names in files -> layers of the live model: exact, by flattening, with CLIP's `text_model.` level or without.

A name that two layers answer to is an error that names both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lora_diffusion.adapter import LayerAdapter, same_layer
from lora_diffusion.errors import AdapterMismatchError


@dataclass
class Resolution:
    """Layers of one component by live name, and the names that found no layer."""

    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)


def resolve(layers: dict[str, LayerAdapter], model: nn.Module) -> Resolution:
    """Match the file's layer names with `model`'s modules. AdapterMismatchError where two candidates answer."""
    live = _index(name for name, _ in model.named_modules() if name)
    result = Resolution()
    for name, layer in layers.items():
        candidates = live.get(same_layer(name), [])
        exact = [candidate for candidate in candidates if candidate == name]
        found = exact or candidates
        if not found:
            result.unmatched.append(name)
        elif len(found) > 1:
            raise AdapterMismatchError(f"{name!r} could be {found[0]!r} or {found[1]!r} of the model")
        elif found[0] in result.layers:
            raise AdapterMismatchError(f"two layers of the file are {found[0]!r} of the model; {name!r} is one")
        else:
            result.layers[found[0]] = layer
    return result


def _index(names: Iterable[str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for name in names:
        index.setdefault(same_layer(name), []).append(name)
    return index
