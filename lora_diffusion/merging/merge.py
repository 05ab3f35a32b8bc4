"""Several adapters -> one: the true weighted sum of their deltas, or another rule, on the deltas alone.

sum     exact by rank concatenation: up = [w_1 s_1 up_1 | w_2 s_2 up_2 | …], down = [down_1; down_2; …]
slerp   along the great circle between two deltas, layer by layer (Shoemake 1985), exact as well
others  rules.py; dense, then back to a rank by SVD

A layer where one of the adapters is no low-rank pair is summed dense and written as `full`, exactly, or as a pair at
a chosen rank. Changes of biases and normalisations are the weighted sum under every rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import AdapterMismatchError, ConfigError, TargetError, did_you_mean
from lora_diffusion.merging.factors import Factors, concatenated, factored, truncated
from lora_diffusion.merging.fullrank import at_full_rank
from lora_diffusion.merging.rules import RULES
from lora_diffusion.merging.shares import Change, Dense, models_of, shares_of

EXACT = ("sum", "slerp")


@dataclass(frozen=True)
class _How:
    """The settings of one merge."""

    method: str
    rank: int | None
    density: float
    random: torch.Generator


@dataclass(frozen=True)
class Merged:
    """One adapter, and the share of the merge's energy (squared Frobenius norm) that its rank keeps."""

    adapter: Adapter
    kept: float


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[Any] | None = None,
    *,
    base: Any = None,
    method: str = "sum",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    name: str = "merged",
    listen: Callable[[int, int], None] = lambda done, of: None,
) -> Merged:
    """One adapter whose delta is the merge of all, in float32; tokens are carried over.

    `weights`: any finite number, also by component, block and layer (default 1 each). `rank`: None keeps "sum" and
    "slerp" exact and gives the others the sum of their ranks. `density` in (0, 1] is the share of elements that
    trimming keeps. `base` is the pipeline or Diffusers folder that the adapters are for: methods other than low-rank
    pairs need it. One layer is dense at a time. ConfigError for settings that cannot be, AdapterMismatchError where
    one layer has two shapes or a token two meanings, or where a layer is not the base's. A T-LoRA is taken at full
    rank, with a UserWarning.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, weights, method, rank, density)
    if not isinstance(given := cast("Any", seed), int):
        raise ConfigError(f"merge: seed is {given!r}; expected a whole number")
    adapters = [at_full_rank(adapter, "merge") for adapter in adapters]
    how = _How(method, rank, density, torch.Generator().manual_seed(seed))
    shares = shares_of(adapters, weights, None if base is None else models_of(base))
    if not shares and any(len(adapter) for adapter in adapters):
        raise ConfigError("merge: the weights are 0 on every layer; nothing would be left to write")
    layers: dict[str, dict[str, LayerAdapter]] = {}
    kept = whole = 0.0
    for done, ((component, layer), parts) in enumerate(shares.items()):
        changes = [(part.change(), part.weight) for part in parts]
        new, held, energy = _combined(changes, f"{component} {layer}", how)
        kept, whole = kept + held, whole + energy
        layers.setdefault(component, {})[layer] = new
        listen(done + 1, len(shares))
    return Merged(Adapter(name, layers, _tokens(adapters)), kept / whole if whole else 1.0)


def _combined(parts: list[tuple[Change, float]], where: str, how: _How) -> tuple[LayerAdapter, float, float]:
    """The layer that says all parts at once, the energy it keeps and the whole energy."""
    pairs = [(change, w) for change, w in parts if isinstance(change, Factors)]
    if len(pairs) < len(parts):
        return _combined_dense(parts, where, how)
    total = sum(factors.rank for factors, _ in pairs)
    if how.method in RULES:
        dense = RULES[how.method]([factors.scaled(w).dense() for factors, w in pairs], how.density, how.random)
        factors, held, energy = factored(dense, how.rank or total, pairs[0][0].kernel)
        return factors.layer(), held, energy
    joined = concatenated(_slerped(pairs) if how.method == "slerp" else [factors.scaled(w) for factors, w in pairs])
    if how.rank is None or how.rank >= total:
        energy = joined.norm() ** 2
        return joined.layer(), energy, energy
    factors, held, energy = truncated(joined, how.rank)
    return factors.layer(), held, energy


def _combined_dense(parts: list[tuple[Change, float]], where: str, how: _How) -> tuple[LayerAdapter, float, float]:
    shape = next(change.weight.shape for change, _ in parts if isinstance(change, Dense))
    biases = [change.bias * w for change, w in parts if isinstance(change, Dense) and change.bias is not None]
    bias = torch.stack(biases).sum(0).float() if biases else None
    if len(shape) == 1:
        return _norm([(change.weight, w) for change, w in parts if isinstance(change, Dense)], bias)
    total = _total([(change.dense(), w) for change, w in parts], how)
    if how.rank is None:
        energy = float(total.square().sum())
        full = {"diff": total.float().reshape(shape)} | ({} if bias is None else {"diff_b": bias})
        return LayerAdapter("full", full), energy, energy
    if bias is not None:
        raise ConfigError(f"merge: {where} has a changed bias, which no low-rank pair can hold; leave the rank away")
    factors, held, energy = factored(total, how.rank, tuple(shape[2:]))
    return factors.layer(), held, energy


def _total(parts: list[tuple[Tensor, float]], how: _How) -> Tensor:
    """Dense deltas (out, in · kh · kw) and their weights -> one delta."""
    if how.method == "slerp" and len(parts) == 2:
        (a, weight_a), (b, weight_b) = parts
        share_a, share_b = _on_the_circle(float(a.norm()), float(b.norm()), float((a * b).sum()), weight_a, weight_b)
        return share_a * a + share_b * b
    weighted = [delta * weight for delta, weight in parts]
    return RULES[how.method](weighted, how.density, how.random) if how.method in RULES else torch.stack(weighted).sum(0)


def _norm(scales: list[tuple[Tensor, float]], shift: Tensor | None) -> tuple[LayerAdapter, float, float]:
    total = torch.stack([scale * weight for scale, weight in scales]).sum(0)
    tensors = {"w_norm": total.float()} | ({} if shift is None else {"b_norm": shift})
    energy = float(total.square().sum())
    return LayerAdapter("norm", tensors), energy, energy


def _slerped(parts: list[tuple[Factors, float]]) -> list[Factors]:
    if len(parts) == 1:
        return [parts[0][0].scaled(parts[0][1])]
    (a, weight_a), (b, weight_b) = parts
    share_a, share_b = _on_the_circle(a.norm(), b.norm(), a.dot(b), weight_a, weight_b)
    return [a.scaled(share_a), b.scaled(share_b)]


def _on_the_circle(norm_a: float, norm_b: float, dot: float, weight_a: float, weight_b: float) -> list[float]:
    """The factors of a and b at weight_b / (weight_a + weight_b) of the way from a to b."""
    t = weight_b / (weight_a + weight_b)
    lengths = norm_a * norm_b
    angle = math.acos(max(-1.0, min(1.0, dot / lengths))) if lengths else 0.0
    if math.sin(angle) < 1e-6:  # parallel: the straight line is the circle
        return [1 - t, t]
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _tokens(adapters: Sequence[Adapter]) -> dict[str, dict[str, Tensor]]:
    tokens: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        for token, vectors in adapter.embeddings.items():
            if token in tokens and not _same(tokens[token], vectors):
                raise AdapterMismatchError(f"adapter {adapter.name!r}: token {token!r} means something else in another")
            tokens[token] = dict(vectors)
    return tokens


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[c]) for c, v in ours.items())


def _check(adapters: Sequence[Adapter], weights: Sequence[Any], method: str, rank: int | None, density: float) -> None:
    known = (*EXACT, *RULES)
    if method not in known:
        raise TargetError(f"no merge method {method!r}; there are {', '.join(known)}{did_you_mean(method, known)}")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"merge: {len(adapters)} adapters and {len(weights)} weights; expected as many, at least one")
    if rank is not None and rank < 1:
        raise ConfigError(f"merge: rank is {rank}, expected at least 1")
    if not 0 < density <= 1:
        raise ConfigError(f"merge: density is {density}, expected more than 0 and at most 1")
    if method == "slerp" and (len(adapters) != 2 or not all(isinstance(w, int | float) and w >= 0 for w in weights)):
        raise ConfigError("merge: slerp goes between two adapters, with two weights that are numbers from 0")
    for adapter in adapters:
        adapter.check()
