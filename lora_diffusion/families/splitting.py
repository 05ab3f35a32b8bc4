"""Rows of a layer's delta: the share of q in a fused qkv, or halves that the live layer has the other way round.

An adapter of a fused layer acts on output rows that several live layers own. Cutting the factor that owns the
rows is exact: for up · down it is `up`, for a Kronecker product rows of the first factor and, where a part begins or
ends within one, a window on what they make; for OFT whole blocks, or sd-scripts' list of them, one for each part. A
magnitude for each input is a norm over all rows of the fused weight, and cannot be divided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.layers import is_norm

Rows = Callable[[Tensor, int], Tensor]

#: method -> the tensors whose first axis is the layer's output rows; the others are shared
_OWNERS: dict[str, tuple[str, ...]] = {
    "lora": ("up",),
    "biased": ("up", "up_bias", "diff_b"),
    "dora": ("up", "magnitude", "diff_b"),
    "locon": ("up", "magnitude", "diff_b"),
    "loha": ("w1_a", "w2_a", "magnitude", "diff_b"),
    "full": ("diff", "diff_b"),
    "ia3": ("weight",),
    "glora": ("b1", "b2"),
    "oft": ("blocks", "diag", "rescale"),
}
_BESIDE = ("magnitude", "diff_b")  # the factors of a Kronecker product, one number a row


def split_rows(layer: LayerAdapter, widths: list[int], name: str) -> list[LayerAdapter]:
    """One adapter for each run of `widths` output rows. AdapterMismatchError where that cannot be exact."""
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    runs = list(pairwise(ends))
    if layer.method == "lokr":
        return [_kronecker_run(layer, start, stop, ends[-1], name) for start, stop in runs]
    if "blocks.0" in layer.tensors:
        return _listed(layer, widths, name)
    owners = _owners(layer, ends[-1], runs, name)
    return [_cut(layer, owners, lambda t, each, a=a, b=b: t[a // each : b // each]) for a, b in runs]


def swap_halves(layer: LayerAdapter, width: int, name: str) -> LayerAdapter:
    """The same delta with the two halves of its `width` output rows exchanged."""
    runs = [(0, width // 2), (width // 2, width)]
    if layer.method == "lokr":
        first, second = (_kronecker_run(layer, start, stop, width, name) for start, stop in runs)
        if "window" in first.tensors:
            raise AdapterMismatchError(f"layer {name!r}: the halves of this Kronecker product cannot be exchanged")
        moved = [part for part in (_first(layer), *_BESIDE) if part in layer.tensors]
        halves = {part: torch.cat([second.tensors[part], first.tensors[part]]) for part in moved}
        return replace(layer, tensors={**layer.tensors, **halves})
    return _cut(layer, _owners(layer, width, runs, name), lambda t, _: t.roll(len(t) // 2, 0))


def of_norm(layer: LayerAdapter, module: nn.Module) -> LayerAdapter:
    """`diff` and `diff_b` of a normalisation under the names that the method for norms has; others as they are."""
    if layer.method != "full" or not is_norm(module):
        return layer
    names = {"diff": "w_norm", "diff_b": "b_norm"}
    return replace(layer, method="norm", tensors={names[key]: tensor for key, tensor in layer.tensors.items()})


def _cut(layer: LayerAdapter, owners: Mapping[str, int], rows: Rows) -> LayerAdapter:
    """`owners`: tensors -> how many of the layer's rows each of their rows stands for."""
    cut = {part: rows(t, owners[part]) if part in owners else t for part, t in layer.tensors.items()}
    return replace(layer, tensors=cut)


def _owners(layer: LayerAdapter, height: int, runs: Sequence[tuple[int, int]], name: str) -> dict[str, int]:
    """The tensors to cut. AdapterMismatchError where that is not exact."""
    there = layer.tensors
    if layer.method not in _OWNERS or {"t1", "t2"} & there.keys():
        raise AdapterMismatchError(f"layer {name!r}: {layer.method} on a fused layer cannot be divided over its parts")
    if (layer.method == "ia3" and there["on_input"].any()) or "R" in there:
        return {}  # every part sees the same inputs
    owners = dict.fromkeys((part for part in _OWNERS[layer.method] if part in there), 1)
    if layer.method == "glora":  # files of 2023 have the two the other way round
        owners = {"b1" if there["b1"].shape[0] == height else "b2": 1}
    if layer.method == "oft":
        owners["diag" if "diag" in there else "blocks"] = _block(layer, runs, name)
    for part, each in owners.items():
        if there[part].ndim == 0 or len(there[part]) * each != height:
            found = tuple(there[part].shape)
            why = "per-input magnitudes cannot be divided" if part == "magnitude" else f"expected {height} rows"
            raise AdapterMismatchError(f"layer {name!r}: {part} has shape {found}; {why}")
    return owners


def _block(layer: LayerAdapter, runs: Sequence[tuple[int, int]], name: str) -> int:
    """Rows that one of OFT's blocks turns."""
    blocks = layer.tensors.get("diag", layer.tensors.get("blocks"))
    if blocks is None or blocks.ndim != 3 or layer.alpha or any(stop % blocks.shape[-1] for _, stop in runs):
        why = "only unbounded OFT with blocks that end where the parts do can be divided"
        raise AdapterMismatchError(f"layer {name!r}: {layer.method} on a fused layer; {why}")
    return blocks.shape[-1]


def _listed(layer: LayerAdapter, widths: list[int], name: str) -> list[LayerAdapter]:
    """One OFT for each tensor of the list, with the bound that sd-scripts gives it: alpha · rows of the part."""
    parts = [layer.tensors[part] for part in sorted(layer.tensors)]
    rows = [len(blocks) * blocks.shape[-1] if blocks.ndim else 0 for blocks in parts]
    if rows != widths:
        raise AdapterMismatchError(f"layer {name!r}: a list of OFT blocks for parts of {rows} rows; expected {widths}")
    return [replace(layer, tensors={"blocks": blocks}) for blocks in parts]


def _first(layer: LayerAdapter) -> str:
    return "w1" if "w1" in layer.tensors else "w1_a"


def _kronecker_run(layer: LayerAdapter, start: int, stop: int, height: int, name: str) -> LayerAdapter:
    """Rows start…stop of kron(w1, w2): row a of w1 gives as many rows as w2 has."""
    there, first = layer.tensors, _first(layer)
    second = there["w2" if "w2" in there else "w2_a"]
    each = second.shape[1] if "t2" in there else second.shape[0]
    beside = {part: there[part] for part in _BESIDE if part in there}
    if len(there[first]) * each != height or any(tensor.shape != (height,) for tensor in beside.values()):
        found = f"{len(there[first])} x {each} rows"
        found += "".join(f" and a {part} of {tuple(tensor.shape)}" for part, tensor in beside.items())
        raise AdapterMismatchError(
            f"layer {name!r}: a Kronecker product of {found} cannot be divided; expected {height} rows"
        )
    begin, end = start // each, -(-stop // each)
    tensors = {**there, first: there[first][begin:end]} | {part: tensor[start:stop] for part, tensor in beside.items()}
    if start % each or stop % each:
        tensors["window"] = torch.tensor([start - begin * each, stop - begin * each])
    return replace(layer, tensors=tensors)
