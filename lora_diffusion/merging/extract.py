"""A tuned model minus its base -> an adapter, layer by layer: one pair of weights is in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import AdapterMismatchError, ConfigError, some
from lora_diffusion.merging.checkpoints import components_of
from lora_diffusion.merging.factors import from_svd
from lora_diffusion.merging.resize import rank_for

#: two-dimensional weights that are tables, not layers
_TABLE = re.compile(r"(^|\.)(\w*token_embedding|position_embedding|embed_tokens|shared|relative_attention_bias)$")


@dataclass(frozen=True)
class Extracted:
    """The adapter, the energy it keeps of all changed layers, and changed tensors that no adapter can hold."""

    adapter: Adapter
    kept: float
    left_out: list[str] = field(default_factory=list)


def extract(
    tuned: Any,
    base: Any,
    *,
    rank: int = 32,
    energy: float = 1.0,
    name: str = "extracted",
    listen: Callable[[int, int], None] = lambda done, of: None,
) -> Extracted:
    """The difference of two models as low-rank pairs of at most `rank`, fewer where they keep `energy` of a layer.

    `tuned` and `base` are Diffusers folders or pipelines, `tuned` also a `.safetensors` checkpoint in its tool's own
    names, where `base` is a folder (`checkpoints.py`). Layers that do not differ are left out; biases, norms and
    embeddings that do are listed. AdapterMismatchError where the models are not of one architecture or do not
    differ; ConfigError for a folder that cannot be read and for quantised weights.
    """
    if rank < 1 or not 0 < energy <= 1:
        raise ConfigError(f"extract: rank {rank}, energy {energy}; expected at least 1, and more than 0 up to 1")
    ours, theirs = components_of(tuned, base), components_of(base)
    if missing := sorted(ours.keys() - theirs.keys()):
        raise AdapterMismatchError(f"extract: the base has no {some(missing)}; it is another kind of model")
    layers: dict[str, dict[str, LayerAdapter]] = {}
    left_out: list[str] = []
    kept = whole = 0.0
    total = sum(map(len, ours.values()))
    pairs = ((c, key, ours[c], theirs[c]) for c in ours for key in ours[c])
    for done, (component, key, mine, base_weights) in enumerate(pairs):
        delta = _difference(f"{component}.{key}", mine[key], base_weights.get(key))
        if delta is not None and not _is_layer(key, delta):
            left_out.append(f"{component}.{key}")
        elif delta is not None:
            layer, held, all_of_it = _low_rank(delta, rank, energy)
            layers.setdefault(component, {})[key.removesuffix(".weight")] = layer
            kept, whole = kept + held, whole + all_of_it
        listen(done + 1, total)
    if not layers:
        raise AdapterMismatchError("extract: no linear layer or convolution differs between the two models")
    return Extracted(Adapter(name, layers), kept / whole, left_out)


def _is_layer(key: str, delta: Tensor) -> bool:
    return key.endswith(".weight") and delta.dim() in (2, 4) and not _TABLE.search(key.removesuffix(".weight"))


def _difference(where: str, tuned: Tensor, base: Tensor | None) -> Tensor | None:
    """tuned - base in float64; None where they are the same, in the narrower precision of the two."""
    if base is None or base.shape != tuned.shape:
        found = "not there" if base is None else str(tuple(base.shape))
        raise AdapterMismatchError(
            f"extract: {where} is {tuple(tuned.shape)}, in the base {found}; another architecture"
        )
    if not tuned.is_floating_point() or not base.is_floating_point():
        if torch.equal(tuned, base):
            return None  # position ids and the like
        raise ConfigError(f"extract: {where} is {tuned.dtype}; quantised weights do not show what was tuned")
    narrow = min(tuned.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    return None if torch.equal(tuned.to(narrow), base.to(narrow)) else tuned.double() - base.double()


def _low_rank(delta: Tensor, rank: int, energy: float) -> tuple[LayerAdapter, float, float]:
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    factors, held, whole = from_svd(u, s, v, min(rank, rank_for(s, energy)), tuple(delta.shape[2:]))
    return factors.layer(), held, whole
