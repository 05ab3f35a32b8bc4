"""How deltas of one layer are combined element by element. Dense, weights inside: d_i = w_i · delta_i.

prune   sum of the largest of each                     magnitude pruning
ties    trim, elect a sign, mean of those that agree   Yadav et al. 2023, arXiv 2306.01708
dare    drop at random, rescale, sum                   Yu et al. 2023, arXiv 2311.03099
della   drop small ones more often, rescale, elect     Deep et al. 2024, arXiv 2406.11617
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[list[Tensor], float, torch.Generator], Tensor]  # deltas, density in (0, 1], random -> one delta

SPREAD = 0.2  # DELLA's epsilon: keep probabilities span density ± SPREAD / 2


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Only the `density` share of largest magnitude; at least one element."""
    keep = max(1, round(density * delta.numel()))
    if keep >= delta.numel():
        return delta
    largest = delta.abs().flatten().topk(keep).indices
    return torch.zeros_like(delta).flatten().index_copy(0, largest, delta.flatten()[largest]).view_as(delta)


def prune(deltas: list[Tensor], density: float, random: torch.Generator) -> Tensor:
    """Sum of the trimmed deltas."""
    return torch.stack([trimmed(delta, density) for delta in deltas]).sum(0)


def ties(deltas: list[Tensor], density: float, random: torch.Generator) -> Tensor:
    """Mean over those deltas that have the elected sign at an element."""
    return _elected([trimmed(delta, density) for delta in deltas])


def dare(deltas: list[Tensor], density: float, random: torch.Generator) -> Tensor:
    """Sum of deltas whose elements are kept with probability `density` and divided by it."""
    dropped = [d * (torch.rand(d.shape, generator=random) < density) / density for d in deltas]
    return torch.stack(dropped).sum(0)


def della(deltas: list[Tensor], density: float, random: torch.Generator) -> Tensor:
    """As `dare` with keep probabilities rising with the magnitude's place in its row, then as `ties`."""
    return _elected([_magnitude_dropped(delta, density, random) for delta in deltas])


def _magnitude_dropped(delta: Tensor, density: float, random: torch.Generator) -> Tensor:
    place = delta.abs().argsort(dim=1).argsort(dim=1) / max(1, delta.shape[1] - 1)  # 0 smallest, 1 largest
    spread = min(SPREAD, 2 * density, 2 * (1 - density))
    keep = density + spread * (place - 0.5)
    kept = torch.rand(delta.shape, generator=random) < keep
    return torch.where(kept, delta / keep.clamp(min=1e-6), 0)


def _elected(deltas: list[Tensor]) -> Tensor:
    stacked = torch.stack(deltas)
    agree = stacked.sign() == stacked.sum(0).sign()
    return (stacked * agree).sum(0) / (agree & (stacked != 0)).sum(0).clamp(min=1)


RULES: dict[str, Rule] = {"prune": prune, "ties": ties, "dare": dare, "della": della}
