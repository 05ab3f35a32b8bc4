"""Names in files -> layers of the live model: exact, by flattening, by the family's original names, by number.

A name that two layers answer to is an error that names both. A fused layer of the file is divided over the
live layers that own its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lora_diffusion.adapter import LayerAdapter, same_layer
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.families.names import Place, places
from lora_diffusion.families.names.numbered import is_numbered, number_layers
from lora_diffusion.families.splitting import split_rows, swap_halves
from lora_diffusion.layers import is_convolution, is_linear, out_width


@dataclass
class Resolution:
    """Layers of one component by live name, and the names that found no layer."""

    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)


def resolve(layers: dict[str, LayerAdapter], model: nn.Module) -> Resolution:
    """Match the file's layer names with `model`'s modules.

    AdapterMismatchError where two candidates answer to one name, two names to one layer, or a fused layer
    cannot be divided.
    """
    live = {name: module for name, module in model.named_modules() if name}
    result = Resolution()
    if is_numbered(layers):
        layers = number_layers(layers, live)
    index = _index(live)
    originals: dict[str, list[tuple[str, Place]]] | None = None
    for name, layer in layers.items():
        found = _direct(name, index)
        if not found:
            if originals is None:  # most files need no table
                originals = _originals(type(model).__name__, live)
            found = originals.get(same_layer(name), [])
        if len(found) > 1:
            raise AdapterMismatchError(f"{name!r} could be {found[0][0]!r} or {found[1][0]!r} of the model")
        if not found:
            result.unmatched.append(name)
            continue
        for target, share in _shares(name, layer, found[0][1], live):
            if target in result.layers:
                raise AdapterMismatchError(f"two layers of the file are {target!r} of the model; {name!r} is one")
            result.layers[target] = share
    return result


def _shares(name: str, layer: LayerAdapter, place: Place, live: dict[str, nn.Module]) -> list[tuple[str, LayerAdapter]]:
    if len(place.layers) == 1 and not place.swapped:
        return [(place.layers[0], layer)]
    odd = [target for target in place.layers if not (is_linear(live[target]) or is_convolution(live[target]))]
    if odd:
        raise AdapterMismatchError(f"{name!r} is {odd[0]!r} of the model, which is no layer whose rows can be divided")
    widths = [out_width(live[target]) for target in place.layers]
    if place.swapped:
        return [(place.layers[0], swap_halves(layer, widths[0], name))]
    return list(zip(place.layers, split_rows(layer, widths, name), strict=True))


def _direct(name: str, index: dict[str, list[str]]) -> list[tuple[str, Place]]:
    candidates = index.get(same_layer(name), [])
    found = [name] if name in candidates else candidates
    return [(candidate, Place((candidate,))) for candidate in found]


def _index(names: Iterable[str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for name in names:
        index.setdefault(same_layer(name), []).append(name)
    return index


def _originals(model_class: str, live: dict[str, nn.Module]) -> dict[str, list[tuple[str, Place]]]:
    index: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places(model_class, live).items():
        index.setdefault(same_layer(name), []).append((name, place))
    return index
