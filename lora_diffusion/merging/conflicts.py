"""Where adapters get in each other's way, per block, from their tensors alone: before anything is drawn.

columns, rows   overlap of the spaces two deltas write to and read from: mean squared cosine of the principal
                angles, |U_aᵀ U_b|² / min(r_a, r_b); 0 orthogonal, 1 one inside the other
signs           share of the common energy sum |a b| where the two pull in opposite directions; 0.5 is chance
ratio           |a| / |b|, Frobenius norms
weights         what makes the two equally strong there, the weaker one at 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, same_layer
from lora_diffusion.errors import ConfigError
from lora_diffusion.gates import blocks_of
from lora_diffusion.merging.factors import Factors, factors_of


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


def conflicts(adapters: Sequence[Adapter]) -> list[Conflict]:
    """Every pair of adapters in every block that both change. ConfigError for fewer than two adapters.

    One layer is dense at a time.
    """
    if len(adapters) < 2:
        raise ConfigError(f"conflicts: {len(adapters)} adapters; expected at least two")
    return [row for a, b in combinations(adapters, 2) for row in _between(a, b)]


def _between(a: Adapter, b: Adapter) -> list[Conflict]:
    theirs = {(component, same_layer(name)): (name, layer) for component, name, layer in b}
    tallies: dict[tuple[str, str], _Tally] = {}
    for component, name, layer in a:
        if found := theirs.get((component, same_layer(name))):
            block = next((n for n in reversed(blocks_of(name) or blocks_of(found[0]))), "other")
            one = factors_of(layer, f"adapter {a.name!r}: {component} {name}")
            other = factors_of(found[1], f"adapter {b.name!r}: {component} {found[0]}")
            _count(tallies.setdefault((component, block), _Tally()), one, other)
    return [_conflict(a.name, b.name, *place, tally) for place, tally in tallies.items()]


def _count(tally: _Tally, one: Factors, other: Factors) -> None:
    (ua, sa, va), (ub, sb, vb) = one.svd(), other.svd()
    columns_a, columns_b, rows_a, rows_b = ua[:, _live(sa)], ub[:, _live(sb)], va[_live(sa)], vb[_live(sb)]
    tally.columns.append(_overlap(columns_a.t() @ columns_b))
    tally.rows.append(_overlap(rows_a @ rows_b.t()))
    product = one.dense().float() * other.dense().float()
    tally.common += float(product.abs().sum())
    tally.against += float(-product.clamp(max=0).sum())
    tally.first += float(sa.square().sum())
    tally.second += float(sb.square().sum())


def _live(values: Tensor) -> Tensor:
    return values > 1e-9 * max(1e-30, float(values[0]))


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
