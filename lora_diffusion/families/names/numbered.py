"""Layers that a file only numbers (cloneofsimo/lora): "#0", "#1", … in the order the model has them.

That tool walked the linear layers inside attention and GEGLU modules. Diffusers <= 0.12 had the feed-forward
between the two attentions of a block, later ones have it behind them; the shapes tell which order a file has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.layers import is_linear, weight_shape

_ATTENTION = re.compile(r"(.*\.(?:attn1|attn2|self_attn))\.(?:to_[qkv]|to_out\.0|[qkv]_proj|out_proj)")
_GEGLU = re.compile(r"(.*\.ff)\.net\.0\.proj")


def is_numbered(names: Collection[str]) -> bool:
    """Whether every name is "#" and a number."""
    return bool(names) and all(name.startswith("#") and name[1:].isdigit() for name in names)


def number_layers(layers: Mapping[str, LayerAdapter], live: Mapping[str, nn.Module]) -> dict[str, LayerAdapter]:
    """The layers under live names. AdapterMismatchError where no known order fits their number and shapes."""
    by_number = [layers[name] for name in sorted(layers, key=lambda name: int(name[1:]))]
    for order in _orders(live):
        if len(order) == len(by_number) and all(
            _fits(layer, live[name]) for name, layer in zip(order, by_number, strict=True)
        ):
            return dict(zip(order, by_number, strict=True))
    counts = " or ".join(sorted({str(len(order)) for order in _orders(live)}))
    raise AdapterMismatchError(
        f"the file numbers {len(layers)} layers; no order of the model's {counts} attention layers has their shapes"
    )


def _orders(live: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    linear = [name for name, module in live.items() if is_linear(module)]
    attention = [name for name in linear if _ATTENTION.fullmatch(name)]
    both = [name for name in linear if _ATTENTION.fullmatch(name) or _GEGLU.fullmatch(name)]
    yield both
    yield _feed_forward_between(both)
    yield attention


def _feed_forward_between(names: list[str]) -> list[str]:
    """Each block's GEGLU before its second attention."""
    place = {name: number for number, name in enumerate(names)}

    def key(name: str) -> tuple[int, int]:
        block = name.rsplit(".attn", 1)[0].removesuffix(".ff.net.0.proj")
        start = min(number for other, number in place.items() if other.startswith(f"{block}."))
        return start, 0 if ".attn1." in name else 1 if ".ff." in name else 2

    return sorted(names, key=key)


def _fits(layer: LayerAdapter, module: nn.Module) -> bool:
    height, width = weight_shape(module)
    tensors = layer.tensors
    return "up" in tensors and (tensors["up"].shape[0], tensors["down"].shape[-1]) == (height, width)
