"""Original names of layers -> layers of the live Diffusers model, one table a family.

Checkpoints of FLUX, SD3, Wan … name their layers in their authors' way, fuse q, k and v into one, and some order
the final modulation (shift, scale) where Diffusers has (scale, shift). Adapters are written in those names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import NamedTuple

from lora_diffusion.families.names import ldm, tables

#: original name, with "{}" for the block's number -> the live layer, or the layers whose rows follow each other
Table = Mapping[str, str | tuple[str, ...]]


_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
_FLAT_BLOCK = re.compile(r"(?<=_)\d+(?=_)")

#: models of which one layer has the name that the checkpoint gives another
EXCHANGED = ("HunyuanDiT2DModel",)


class Place(NamedTuple):
    """Where a layer of a file lives in the model.

    `layers`: one live name, or several whose output rows, in this order, are the file's. `swapped`: the
    file's output rows come as (shift, scale) and the live layer's as (scale, shift).
    """

    layers: tuple[str, ...]
    swapped: bool = False


def places(model_class: str, live: Collection[str]) -> dict[str, Place]:
    """Original name -> place, for every original name whose layers are all in `live`; empty for unknown classes."""
    found: dict[str, Place] = {}
    if model_class in ldm.CLASSES:
        found = {name: Place((layer,)) for name, layer in ldm.names(live).items() if layer in live}
    for table in tables.TABLES.get(model_class, ()):
        found |= _expand(table, live)
    swap = _SWAPPED.get(model_class)
    return {name: place._replace(swapped=bool(swap and swap(place.layers[0], live))) for name, place in found.items()}


def is_of_checkpoint(layer: str) -> bool:
    """Whether a layer in a numbered block has a name (dotted) that a checkpoint has and no Diffusers model."""
    numbers = _BLOCK.finditer(layer)
    return any(f"{layer[: at.start()]}{{}}{layer[at.end() :]}" in _numbered() for at in numbers)


@cache
def _numbered() -> frozenset[str]:
    """Names of layers in numbered blocks that checkpoints have, less those that some Diffusers model has as well."""
    every = [(name, targets) for found in tables.TABLES.values() for table in found for name, targets in table.items()]
    live = {layer for _, targets in every for layer in ((targets,) if isinstance(targets, str) else targets)}
    return frozenset({name for name, _ in every if "{}" in name} - live)


def side_of(layer: str) -> str:
    """Whose name a layer in a numbered block has, dotted or flattened: "checkpoint", "diffusers", or "" of neither.

    "diffusers" says that the checkpoint of a family known here calls that layer otherwise, not that all do.
    """
    flat = layer.replace(".", "_")
    for at in _FLAT_BLOCK.finditer(flat):
        name = f"{flat[: at.start()]}{{}}{flat[at.end() :]}"
        if found := next((side for side, names in _sides().items() if name in names), ""):
            return found
    return ""


@cache
def _sides() -> dict[str, frozenset[str]]:
    every = [(name, targets) for found in tables.TABLES.values() for table in found for name, targets in table.items()]
    named = {name.replace(".", "_") for name, _ in every if "{}" in name}
    live = {
        layer.replace(".", "_")
        for _, targets in every
        for layer in ((targets,) if isinstance(targets, str) else targets)
        if "{}" in layer
    }
    return {"checkpoint": frozenset(named - live), "diffusers": frozenset(live - named)}


def _expand(table: Table, live: Collection[str]) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for original, targets in table.items():
        layers = (targets,) if isinstance(targets, str) else targets
        for number in _numbers(layers[0], live):
            place = Place(tuple(layer.format(number) for layer in layers))
            if all(layer in live for layer in place.layers):
                name = original.format(number)
                found[name] = place
                if len(layers) > 1:  # OneTrainer and OMI store one part for each projection
                    found |= {f"{name}.{part}": Place((layer,)) for part, layer in enumerate(place.layers)}
    return found


def _numbers(layer: str, live: Collection[str]) -> list[str]:
    before, block, after = layer.partition("{}")
    if not block:
        return [""]
    numbers = (name[len(before) : len(name) - len(after)] for name in live if name.startswith(before))
    return sorted({number for number in numbers if number.isdigit()}, key=int)


def _final(layer: str, live: Collection[str]) -> bool:
    return layer == "norm_out.linear"


def _final_or_last_context(layer: str, live: Collection[str]) -> bool:
    """SD3's last context block has a final modulation too: it is the one without an output projection."""
    block = layer.removesuffix(".norm1_context.linear")
    return layer == "norm_out.linear" or (block != layer and f"{block}.attn.to_add_out" not in live)


def _final_or_gated(layer: str, live: Collection[str]) -> bool:
    """Mochi's feed-forwards have the gate first, Diffusers' the values."""
    return layer == "norm_out.linear" or layer.endswith((".ff.net.0.proj", ".ff_context.net.0.proj"))


_SWAPPED: dict[str, Callable[[str, Collection[str]], bool]] = {
    "FluxTransformer2DModel": _final,
    "Flux2Transformer2DModel": _final,
    "HunyuanVideoTransformer3DModel": _final,
    "HunyuanVideoFramepackTransformer3DModel": _final,
    "HunyuanDiT2DModel": _final,
    "MochiTransformer3DModel": _final_or_gated,
    "AuraFlowTransformer2DModel": _final,
    "SD3Transformer2DModel": _final_or_last_context,
}
