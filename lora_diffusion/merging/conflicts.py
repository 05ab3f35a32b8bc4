"""Where adapters get in each other's way, per block, from their tensors alone: before anything is drawn.

columns, rows   overlap of the spaces two deltas write to and read from: mean squared cosine of the principal
                angles, |U_aᵀ U_b|² / min(r_a, r_b); 0 orthogonal, 1 one inside the other
signs           share of the common energy sum |a b| where the two pull in opposite directions; 0.5 is chance
ratio           |a| / |b|, Frobenius norms
weights         what makes the two equally strong there, the weaker one at 1

Spaces are those of a low-rank pair; of another method's change, the directions that hold 99 % of its energy.
Normalisations have no spaces and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.gates import blocks_of
from lora_diffusion.merging.factors import Factors
from lora_diffusion.merging.resize import rank_for
from lora_diffusion.merging.shares import Change, Dense, Models, models_of, shares_of

ENERGY = 0.99  # that the leading directions of a change without a rank hold


@dataclass(frozen=True)
class Conflict:
    """Two adapters in one block of one component; see the module for the figures."""

    first: str
    second: str
    component: str
    block: str
    columns: float
    rows: float
    signs: float
    ratio: float
    weights: tuple[float, float]


@dataclass
class _Tally:
    columns: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    against: float = 0.0
    common: float = 0.0
    first: float = 0.0
    second: float = 0.0


def conflicts(adapters: Sequence[Adapter], base: Any = None) -> list[Conflict]:
    """Every pair of adapters in every block that both change. ConfigError for fewer than two adapters.

    `base` is the pipeline or Diffusers folder that they are for: methods other than low-rank pairs need it. One
    layer is dense at a time.
    """
    if len(adapters) < 2:
        raise ConfigError(f"conflicts: {len(adapters)} adapters; expected at least two")
    models = None if base is None else models_of(base)
    return [row for a, b in combinations(adapters, 2) for row in _between(a, b, models)]


def _between(a: Adapter, b: Adapter, models: Models | None) -> list[Conflict]:
    tallies: dict[tuple[str, str], _Tally] = {}
    for (component, name), shares in shares_of([a, b], [1.0, 1.0], models).items():
        changes = [share.change() for share in shares] if len(shares) == 2 else []
        if changes and all(isinstance(one, Factors) or one.weight.dim() > 1 for one in changes):
            block = next(reversed(blocks_of(name)), "other")
            _count(tallies.setdefault((component, block), _Tally()), *changes)
    return [_conflict(a.name, b.name, *place, tally) for place, tally in tallies.items()]


def _count(tally: _Tally, one: Change, other: Change) -> None:
    (ua, sa, va), (ub, sb, vb) = _leading(one), _leading(other)
    tally.columns.append(_overlap(ua.t() @ ub))
    tally.rows.append(_overlap(va @ vb.t()))
    product = one.dense().float() * other.dense().float()
    tally.common += float(product.abs().sum())
    tally.against += float(-product.clamp(max=0).sum())
    tally.first += float(sa.square().sum())
    tally.second += float(sb.square().sum())


def _leading(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """The spaces a change writes to (out, k) and reads from (k, in · kh · kw), between them all singular values."""
    u, s, v = change.svd()
    count = int((s > 1e-9 * max(1e-30, float(s[0]))).sum())
    if isinstance(change, Dense):
        count = min(count, rank_for(s, ENERGY))
    return u[:, :count], s, v[:count]


def _overlap(cosines: Tensor) -> float:
    return float(cosines.square().sum()) / min(cosines.shape) if min(cosines.shape) else 0.0


def _conflict(first: str, second: str, component: str, block: str, tally: _Tally) -> Conflict:
    norms = torch.tensor([tally.first, tally.second], dtype=torch.float64).sqrt()
    weaker = float(norms.min())
    return Conflict(
        first,
        second,
        component,
        block,
        sum(tally.columns) / len(tally.columns),
        sum(tally.rows) / len(tally.rows),
        tally.against / tally.common if tally.common else 0.0,
        float(norms[0] / norms[1]) if norms[1] else math.inf,
        (weaker / float(norms[0]) if norms[0] else 1.0, weaker / float(norms[1]) if norms[1] else 1.0),
    )
