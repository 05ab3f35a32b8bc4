"""An adapter at another rank: the best approximation of each layer's delta, or the first rows of a nested one.

Other methods' changes, taken of the base model's layers, become low-rank pairs too; those of normalisations stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.merging.factors import Factors, from_svd
from lora_diffusion.merging.fullrank import at_full_rank
from lora_diffusion.merging.shares import Change, Dense, Models, models_of, shares_of

Listen = Callable[[int, int], None]  # layers done, of how many


@dataclass(frozen=True)
class Resized:
    """The new adapter, the share of energy it keeps, and the rank of each (component, layer)."""

    adapter: Adapter
    kept: float
    ranks: dict[tuple[str, str], int]


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    base: Any = None,
    listen: Listen = lambda done, of: None,
) -> Resized:
    """Lower the ranks. Give one of: `rank` for every layer, or what every layer keeps at least.

    `energy` is the share of the squared Frobenius norm in (0, 1], `frobenius` that of the norm itself; with either,
    `rank` may stand beside it as the most a layer gets. `base` is the pipeline or Diffusers folder that the adapter is
    for: methods other than low-rank pairs need it. ConfigError for settings that cannot be and for a changed bias,
    which no pair can hold; AdapterMismatchError where a layer is not the base's.
    """
    if energy is not None and frobenius is not None:
        raise ConfigError(f"resize: energy {energy} and frobenius {frobenius}; expected one of them")
    if frobenius is not None:
        energy = math.copysign(frobenius**2, frobenius)
    if (rank is None and energy is None) or (rank is not None and rank < 1):
        raise ConfigError(f"resize: rank is {rank}; expected a rank of at least 1, an energy or a Frobenius share")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"resize: the share to keep is {energy}; expected more than 0 and at most 1")

    def best(change: Change) -> tuple[Factors, float, float]:
        u, s, v = change.svd()
        wanted = min(rank or len(s), rank_for(s, energy) if energy is not None else len(s))
        return from_svd(u, s, v, wanted, change.kernel)

    return _by_layer(adapter, None if base is None else models_of(base), best, listen)


def cut(adapter: Adapter, rank: int, *, listen: Listen = lambda done, of: None) -> Resized:
    """The first `rank` rows of every layer, the scale as it was: for an adapter trained nested (DyLoRA).

    `kept` is 1 minus the share of the squared Frobenius norm that is lost. ConfigError for a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"resize: rank is {rank}; expected a rank of at least 1")

    def first(factors: Change) -> tuple[Factors, float, float]:
        assert isinstance(factors, Factors)  # without a base there is nothing else
        rest = Factors(factors.up[:, rank:], factors.down[rank:], factors.kernel)
        whole = factors.norm() ** 2
        return Factors(factors.up[:, :rank], factors.down[:rank], factors.kernel), whole - rest.norm() ** 2, whole

    return _by_layer(adapter, None, first, listen)


def rank_for(values: torch.Tensor, energy: float) -> int:
    """The fewest singular values (falling) whose squares are `energy` of the sum of all."""
    shares = values.square().cumsum(0)
    if not float(shares[-1]):
        return 1
    return int(torch.searchsorted(shares / shares[-1], torch.tensor(energy - 1e-12, dtype=shares.dtype))) + 1


def _by_layer(
    adapter: Adapter, models: Models | None, shrink: Callable[[Change], tuple[Factors, float, float]], listen: Listen
) -> Resized:
    """`shrink` gives a layer's smaller factors, the energy they keep and the whole energy."""
    adapter.check()
    adapter = at_full_rank(adapter, "resize")
    layers: dict[str, dict[str, LayerAdapter]] = {}
    ranks: dict[tuple[str, str], int] = {}
    kept = whole = 0.0
    shares = shares_of([adapter], [1.0], models)
    for done, ((component, name), (share,)) in enumerate(shares.items()):
        change, new = share.change(), share.layer
        if isinstance(change, Factors) or change.weight.dim() > 1:
            if isinstance(change, Dense) and change.bias is not None:
                raise ConfigError(f"resize: {share.where} changes a bias, which no low-rank pair can hold")
            smaller, held, total = shrink(change)
            kept, whole, ranks[component, name] = kept + held, whole + total, smaller.rank
            new = smaller.layer()
        layers.setdefault(component, {})[name] = new
        listen(done + 1, len(shares))
    if not ranks:
        raise ConfigError(f"resize: adapter {adapter.name!r} changes normalisations alone, which have no rank")
    metadata = _without_losses(adapter.metadata)
    return Resized(replace(adapter, layers=layers, metadata=metadata), kept / whole if whole else 1.0, ranks)


def _without_losses(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without the held-out losses of our training, which were the larger adapter's."""
    try:
        facts: Any = json.loads(metadata.get("lora_diffusion", "{}"))
        true = {key: value for key, value in facts.items() if not key.startswith("heldout_loss_")}
    except (ValueError, AttributeError, RecursionError):
        return dict(metadata)  # nothing of ours
    changed = {"lora_diffusion": json.dumps(true, sort_keys=True)} if len(true) < len(facts) else {}
    return dict(metadata) | changed
