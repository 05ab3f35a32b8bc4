"""Names in files -> layers of the live model: exact, by flattening, by the family's original names, by number.

A name that two layers answer to is an error that names both. Where a checkpoint gives one layer the name that
Diffusers gives another (HunyuanDiT's second and third norm), the file's other names say whose it is. A fused layer of
the file is divided over the live layers that own its rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from torch import nn

from lora_diffusion.adapter import LayerAdapter, same_layer
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.families.names import EXCHANGED, Place, places
from lora_diffusion.families.names.numbered import is_numbered, number_layers
from lora_diffusion.families.splitting import of_norm, split_rows, swap_halves
from lora_diffusion.layers import is_convolution, is_linear, out_width


@dataclass
class Resolution:
    """Layers of one component by live name, and the names that found no layer."""

    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)  # live name -> the file's name for it
    unmatched: list[str] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)  # the file's name -> why it has no place; if not strict


def resolve(layers: dict[str, LayerAdapter], model: nn.Module, *, strict: bool = True) -> Resolution:
    """Match the file's layer names with `model`'s modules.

    AdapterMismatchError where two candidates answer to one name, two names to one layer, or a fused layer
    cannot be divided. Not strict, such a name stands in `faults` and has no share in `layers`.
    """
    live = _Live(model, layers)
    result = Resolution()
    for name, layer in _named(layers, live, result, strict).items():
        try:
            shares = _shares(name, layer, live)
            if taken := [target for target, _ in shares if target in result.layers]:
                other = result.origins[taken[0]]
                raise AdapterMismatchError(f"{name!r} and {other!r} of the file are both {taken[0]!r} of the model")
        except AdapterMismatchError as error:
            if strict:
                raise
            result.faults[name] = str(error)
            continue
        if not shares:
            result.unmatched.append(name)
        result.layers |= shares
        result.origins |= {target: name for target, _ in shares}
    return result


class _Live:
    """A model's modules by name, by flattened name and by the checkpoint's own; `asked`: all names of the file."""

    def __init__(self, model: nn.Module, asked: Collection[str]) -> None:
        self.kind = type(model).__name__
        self._asked = asked
        self.modules = {name: module for name, module in model.named_modules() if name}
        self._names = tuple(self.modules)
        self._flat = _flattened(self._names)

    @cached_property
    def _by_original(self) -> Mapping[str, Sequence[tuple[str, Place]]]:
        return _originals(self.kind, self._names)

    @cached_property
    def _by_tower(self) -> Mapping[str, Sequence[tuple[str, Place]]]:
        index: dict[str, list[tuple[str, Place]]] = {}
        for flat, names in self._flat.items():
            if _TOWER.match(flat) or flat.startswith("layers_"):
                index.setdefault(_bare(flat), []).extend((name, Place((name,))) for name in names)
        return index

    def find(self, name: str) -> Place | None:
        """The place that a file's name means; AdapterMismatchError for two of them."""
        flat = same_layer(name)
        candidates = self._flat.get(flat, ())
        if name in candidates or len(candidates) == 1:  # most files need no table of originals
            exact = name if name in candidates else candidates[0]
            if self.kind in EXCHANGED and flat in self._by_original:
                return self._exchanged(name, exact, self._by_original[flat][0][1])
            if _holds_numbers(self.modules[exact]) or flat not in self._by_original:
                return Place((exact,))
            candidates = ()  # Wan's norm3 is Diffusers' norm2, whose own norm3 has nothing to adapt
        found = [(c, Place((c,))) for c in candidates] or self._by_original.get(flat)
        found = found or self._by_tower.get(_bare(flat), ())
        for other, place in found[1:]:
            if place != found[0][1]:  # one layer may have several original names that flatten alike
                raise AdapterMismatchError(f"{name!r} could be {found[0][0]!r} or {other!r} of the model")
        return found[0][1] if found else None

    def _exchanged(self, name: str, exact: str, original: Place) -> Place:
        """Which of two a name means that is of one layer here and of another in the checkpoint."""
        if not _holds_numbers(self.modules[exact]) or (self._only_originals and not self._only_live):
            return original
        if self._only_live and not self._only_originals:
            return Place((exact,))
        known = "has both kinds of names" if self._only_live else "has no other name that would tell"
        raise AdapterMismatchError(
            f"{name!r} could be {exact!r} of the model or, as its checkpoint calls it, {original.layers[0]!r}; "
            f"the file {known}"
        )

    @cached_property
    def _only_originals(self) -> bool:
        """Whether the file has names that the checkpoint alone has."""
        return any(same_layer(name) in self._by_original and not self._is_live(name) for name in self._asked)

    @cached_property
    def _only_live(self) -> bool:
        """Whether the file has names that Diffusers' model alone has, among the layers that the checkpoint renames."""
        renamed = {layer for found in self._by_original.values() for _, place in found for layer in place.layers}
        flat = {same_layer(layer) for layer in renamed}
        asked = [same_layer(name) for name in self._asked]
        return any(name in flat and name not in self._by_original for name in asked)

    def _is_live(self, name: str) -> bool:
        return any(_holds_numbers(self.modules[live]) for live in self._flat.get(same_layer(name), ()))


def _holds_numbers(module: nn.Module) -> bool:
    own = vars(module)
    return any(tensor is not None for kind in ("_parameters", "_buffers") for tensor in own[kind].values())


#: levels round the layers of a language model: ForCausalLM and models of pictures and text have them, others not
_TOWER = re.compile(r"(?:model_|language_model_)+(?=layers_)")


def _bare(flat: str) -> str:
    return _TOWER.sub("", flat, count=1) if flat.startswith(("model_", "language_model_")) else flat


@lru_cache(maxsize=16)  # by all names of a model: what is built of the same names is the same
def _flattened(names: tuple[str, ...]) -> Mapping[str, Sequence[str]]:
    index: dict[str, list[str]] = {}
    for name in names:
        index.setdefault(same_layer(name), []).append(name)
    return index


@lru_cache(maxsize=16)
def _originals(kind: str, names: tuple[str, ...]) -> Mapping[str, Sequence[tuple[str, Place]]]:
    index: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places(kind, dict.fromkeys(names)).items():
        index.setdefault(same_layer(name), []).append((name, place))
    return index


def _named(layers: dict[str, LayerAdapter], live: _Live, result: Resolution, strict: bool) -> dict[str, LayerAdapter]:
    if not is_numbered(layers):
        return layers
    try:
        return number_layers(layers, live.modules)
    except AdapterMismatchError as error:
        if strict:
            raise
        result.faults = dict.fromkeys(layers, str(error))
        return {}


def _shares(name: str, layer: LayerAdapter, live: _Live) -> list[tuple[str, LayerAdapter]]:
    place = live.find(name)
    if place is None:
        return []
    if len(place.layers) == 1 and "blocks.1" in layer.tensors:
        raise AdapterMismatchError(f"{name!r} has OFT blocks in parts, and {place.layers[0]!r} of the model has none")
    if len(place.layers) == 1 and not place.swapped:
        return [(place.layers[0], of_norm(layer, live.modules[place.layers[0]]))]
    modules = [live.modules[target] for target in place.layers]
    if odd := [t for t, m in zip(place.layers, modules, strict=True) if not (is_linear(m) or is_convolution(m))]:
        raise AdapterMismatchError(f"{name!r} is {odd[0]!r} of the model, which is no layer whose rows can be divided")
    widths = [out_width(module) for module in modules]
    if place.swapped:
        return [(place.layers[0], swap_halves(layer, widths[0], name))]
    return list(zip(place.layers, split_rows(layer, widths, name), strict=True))
