"""Rows of a layer's delta: the share of q in a fused qkv, or halves that the live layer has the other way round.

An adapter of a fused layer acts on output rows that several live layers own. Cutting the factor that owns the
rows is exact: for up · down it is `up`, for Kronecker factors whole rows of the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import AdapterMismatchError

Rows = Callable[[Tensor], Tensor]

#: method -> the tensors whose first axis is the layer's output rows; the others are shared
_OWNERS: dict[str, tuple[str, ...]] = {
    "lora": ("up", "up_bias", "diff_b"),
    "dora": ("up", "up_bias", "diff_b", "magnitude"),
    "locon": ("up", "diff_b"),
    "loha": ("w1_a", "w2_a", "diff_b", "magnitude"),
    "full": ("diff", "diff_b"),
}


def split_rows(layer: LayerAdapter, widths: list[int], name: str) -> list[LayerAdapter]:
    """One adapter for each run of `widths` output rows. AdapterMismatchError where that cannot be exact."""
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    runs = list(pairwise(ends))
    if layer.method == "lokr":
        return [_kronecker_run(layer, start, stop, ends[-1], name) for start, stop in runs]
    _check_rows(layer, ends[-1], name)
    return [_cut(layer, lambda t, start=start, stop=stop: t[start:stop]) for start, stop in runs]


def swap_halves(layer: LayerAdapter, width: int, name: str) -> LayerAdapter:
    """The same delta with the two halves of its `width` output rows exchanged."""
    if layer.method == "lokr":
        first, second = split_rows(layer, [width // 2, width - width // 2], name)
        return _cut(layer, lambda _: torch.cat([_owner(second), _owner(first)]), _owner_name(layer))
    _check_rows(layer, width, name)
    return _cut(layer, lambda t: t.roll(t.shape[0] // 2, 0))


def _cut(layer: LayerAdapter, rows: Rows, only: str | None = None) -> LayerAdapter:
    owners = (only,) if only else _OWNERS[layer.method]
    return replace(layer, tensors={part: rows(t) if part in owners else t for part, t in layer.tensors.items()})


def _check_rows(layer: LayerAdapter, height: int, name: str) -> None:
    owners = _OWNERS.get(layer.method)
    if owners is None or {"t1", "t2"} & layer.tensors.keys():
        raise AdapterMismatchError(f"layer {name!r}: {layer.method} on a fused layer cannot be divided over its parts")
    for part in owners:
        if part in layer.tensors and layer.tensors[part].shape[:1] != (height,):
            found = tuple(layer.tensors[part].shape)
            why = "per-input magnitudes cannot be divided" if part == "magnitude" else f"expected {height} rows"
            raise AdapterMismatchError(f"layer {name!r}: {part} has shape {found}; {why}")


def _owner_name(layer: LayerAdapter) -> str:
    return "w1" if "w1" in layer.tensors else "w1_a"


def _owner(layer: LayerAdapter) -> Tensor:
    return layer.tensors[_owner_name(layer)]


def _kronecker_run(layer: LayerAdapter, start: int, stop: int, height: int, name: str) -> LayerAdapter:
    """Rows start…stop of kron(w1, w2): row a of w1 gives as many rows as w2 has."""
    second = layer.tensors["w2" if "w2" in layer.tensors else "w2_a"]
    each = second.shape[1] if "t2" in layer.tensors else second.shape[0]
    if _owner(layer).shape[0] * each != height or start % each or stop % each or "magnitude" in layer.tensors:
        raise AdapterMismatchError(
            f"layer {name!r}: a Kronecker product of {_owner(layer).shape[0]} x {each} rows cannot be cut at row {stop}"
        )
    return _cut(layer, lambda t: t[start // each : stop // each], _owner_name(layer))
