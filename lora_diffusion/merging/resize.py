"""An adapter at another rank: the best approximation of each layer's delta, or the first rows of a nested one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.merging.factors import Factors, factors_of, from_svd
from lora_diffusion.merging.fullrank import at_full_rank

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
    listen: Listen = lambda done, of: None,
) -> Resized:
    """Lower the ranks. Give one of: `rank` for every layer, or what every layer keeps at least.

    `energy` is the share of the squared Frobenius norm in (0, 1], `frobenius` that of the norm itself; with either,
    `rank` may stand beside it as the most a layer gets. ConfigError for settings that cannot be.
    """
    if frobenius is not None:
        energy = frobenius**2
    if (rank is None and energy is None) or (rank is not None and rank < 1):
        raise ConfigError(f"resize: rank is {rank}; expected a rank of at least 1, an energy or a Frobenius share")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"resize: the share to keep is {energy}; expected more than 0 and at most 1")

    def best(factors: Factors) -> tuple[Factors, float, float]:
        u, s, v = factors.svd()
        wanted = min(rank or len(s), rank_for(s, energy) if energy is not None else len(s))
        return from_svd(u, s, v, wanted, factors.kernel)

    return _by_layer(adapter, best, listen)


def cut(adapter: Adapter, rank: int, *, listen: Listen = lambda done, of: None) -> Resized:
    """The first `rank` rows of every layer, the scale as it was: for an adapter trained nested (DyLoRA).

    `kept` is 1 minus the share of the squared Frobenius norm that is lost. ConfigError for a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"resize: rank is {rank}; expected a rank of at least 1")

    def first(factors: Factors) -> tuple[Factors, float, float]:
        rest = Factors(factors.up[:, rank:], factors.down[rank:], factors.kernel)
        whole = factors.norm() ** 2
        return Factors(factors.up[:, :rank], factors.down[:rank], factors.kernel), whole - rest.norm() ** 2, whole

    return _by_layer(adapter, first, listen)


def rank_for(values: torch.Tensor, energy: float) -> int:
    """The fewest singular values (falling) whose squares are `energy` of the sum of all."""
    shares = values.square().cumsum(0)
    if not float(shares[-1]):
        return 1
    return int(torch.searchsorted(shares / shares[-1], torch.tensor(energy - 1e-12, dtype=shares.dtype))) + 1


def _by_layer(adapter: Adapter, shrink: Callable[[Factors], tuple[Factors, float, float]], listen: Listen) -> Resized:
    """`shrink` gives a layer's smaller factors, the energy they keep and the whole energy."""
    adapter.check()
    adapter = at_full_rank(adapter, "resize")
    layers: dict[str, dict[str, LayerAdapter]] = {}
    ranks: dict[tuple[str, str], int] = {}
    kept = whole = 0.0
    for done, (component, name, layer) in enumerate(adapter):
        smaller, held, total = shrink(factors_of(layer, f"adapter {adapter.name!r}: {component} {name}"))
        kept, whole, ranks[component, name] = kept + held, whole + total, smaller.rank
        layers.setdefault(component, {})[name] = smaller.layer()
        listen(done + 1, len(adapter))
    return Resized(replace(adapter, layers=layers), kept / whole if whole else 1.0, ranks)
