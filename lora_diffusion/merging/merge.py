"""Several adapters -> one: the true weighted sum of their deltas, or another rule, on the deltas alone.

sum     exact by rank concatenation: up = [w_1 s_1 up_1 | w_2 s_2 up_2 | …], down = [down_1; down_2; …]
slerp   along the great circle between two deltas, layer by layer (Shoemake 1985), exact as well
others  rules.py; dense, then back to a rank by SVD
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_diffusion.adapter import Adapter, LayerAdapter, same_layer
from lora_diffusion.errors import AdapterMismatchError, ConfigError, TargetError, did_you_mean
from lora_diffusion.gates import resolve_weight
from lora_diffusion.merging.factors import Factors, concatenated, factored, factors_of, truncated
from lora_diffusion.merging.rules import RULES

EXACT = ("sum", "slerp")
Share = tuple[Factors, float]  # a layer's factors in one adapter, and its weight there


@dataclass(frozen=True)
class Merged:
    """One adapter, and the share of the merge's energy (squared Frobenius norm) that its rank keeps."""

    adapter: Adapter
    kept: float


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[Any] | None = None,
    *,
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
    trimming keeps. One layer is dense at a time. ConfigError for settings that cannot be, AdapterMismatchError
    where one layer has two shapes or a token two meanings.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, weights, method, rank, density)
    random = torch.Generator().manual_seed(seed)
    shares = _shares(adapters, weights)
    layers: dict[str, dict[str, LayerAdapter]] = {}
    kept = whole = 0.0
    for done, ((component, layer), parts) in enumerate(shares.items()):
        factors, held, energy = _combined([part for part in parts if part[1]], method, rank, density, random)
        kept, whole = kept + held, whole + energy
        layers.setdefault(component, {})[layer] = factors.layer()
        listen(done + 1, len(shares))
    return Merged(Adapter(name, layers, _tokens(adapters)), kept / whole if whole else 1.0)


def _combined(
    parts: list[Share], method: str, rank: int | None, density: float, random: torch.Generator
) -> tuple[Factors, float, float]:
    total = sum(factors.rank for factors, _ in parts)
    if method in RULES:
        dense = RULES[method]([factors.scaled(w).dense() for factors, w in parts], density, random)
        return factored(dense, rank or total, parts[0][0].kernel)
    joined = concatenated(_slerped(parts) if method == "slerp" else [factors.scaled(w) for factors, w in parts])
    if rank is None or rank >= total:
        energy = joined.norm() ** 2
        return joined, energy, energy
    return truncated(joined, rank)


def _slerped(parts: list[Share]) -> list[Factors]:
    if len(parts) == 1:
        return [parts[0][0].scaled(parts[0][1])]
    (a, weight_a), (b, weight_b) = parts
    t = weight_b / (weight_a + weight_b)
    lengths = a.norm() * b.norm()
    angle = math.acos(max(-1.0, min(1.0, a.dot(b) / lengths))) if lengths else 0.0
    if math.sin(angle) < 1e-6:  # parallel: the straight line is the circle
        return [a.scaled(1 - t), b.scaled(t)]
    return [a.scaled(math.sin((1 - t) * angle) / math.sin(angle)), b.scaled(math.sin(t * angle) / math.sin(angle))]


def _shares(adapters: Sequence[Adapter], weights: Sequence[Any]) -> dict[tuple[str, str], list[Share]]:
    """(component, layer) -> its factors and weights in the adapters that change it; one with dots names the layer."""
    names: dict[tuple[str, str], str] = {}
    found: dict[tuple[str, str], list[Share]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        levels = resolve_weight(weight, {c: list(of) for c, of in adapter.layers.items()}, adapter.name)
        for component, name, layer in adapter:
            where = f"adapter {adapter.name!r}: {component} {name}"
            number, key = levels.at(component, name), (component, same_layer(name))
            if not isinstance(number, float | int):
                raise ConfigError(
                    f"{where}: weight {number!r} changes by step, image or place; a file holds one number"
                )
            factors = factors_of(layer, where)
            others = found.setdefault(key, [])
            if others and _shape(others[0][0]) != _shape(factors):
                raise AdapterMismatchError(f"{where} is {_shape(factors)}, {_shape(others[0][0])} in another adapter")
            others.append((factors, float(number)))
            names[key] = name if "." in name else names.get(key, name)
    return {(key[0], names[key]): parts for key, parts in found.items() if any(weight for _, weight in parts)}


def _shape(factors: Factors) -> tuple[int, ...]:
    return (factors.up.shape[0], factors.down.shape[1])


def _tokens(adapters: Sequence[Adapter]) -> dict[str, dict[str, torch.Tensor]]:
    tokens: dict[str, dict[str, torch.Tensor]] = {}
    for adapter in adapters:
        for token, vectors in adapter.embeddings.items():
            if token in tokens and not _same(tokens[token], vectors):
                raise AdapterMismatchError(f"adapter {adapter.name!r}: token {token!r} means something else in another")
            tokens[token] = dict(vectors)
    return tokens


def _same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
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
