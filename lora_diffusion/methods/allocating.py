"""AdaLoRA's budget: how important each rank of each layer is, how many may stay, and which are set to 0.

Zhang et al. 2023, arXiv 2303.10512; every formula as in PEFT's `RankAllocator`, which is the peer it is tested with.

    s = |w · ∂L/∂w|      s̄ ← β₁ s̄ + (1 - β₁) s      u ← β₂ u + (1 - β₂) |s - s̄|       of every number w
    importance of rank i = s̄u of sigma[i] + mean of s̄u over down[i] + mean of s̄u over up[:, i]
    budget(t) = final + (first - final) · (1 - (t - hold) / (steps - settle - hold))³
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PREFIX = "course/"  # of its tensors in a checkpoint


@dataclass(frozen=True)
class Triplet:
    """The trained tensors of one layer: `down` (rank, …), `sigma` (rank,), `up` (out, rank[, 1, 1])."""

    down: nn.Parameter
    sigma: nn.Parameter
    up: nn.Parameter

    def importance(self, score: Mapping[str, Tensor]) -> Tensor:
        """(rank,) from the score of every number of `down`, `sigma` and `up`."""
        return score["sigma"] + (score["down"].flatten(1).mean(1) + score["up"].flatten(1).mean(0))

    def penalty(self) -> Tensor:
        """‖down downᵀ - I‖ + ‖upᵀ up - I‖, Frobenius norms."""
        grams = (rows @ rows.t() for rows in (self.down.flatten(1), self.up.flatten(1).t()))
        first, second = (torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams)
        return first + second


@dataclass(frozen=True)
class Schedule:
    """Of a run of `steps`: see `AdaLoRA`. `final` is the number of ranks of all layers together in the end."""

    steps: int
    hold: int
    settle: int
    every: int
    final: int

    @property
    def last(self) -> int:
        """The step after which no rank is dropped any more."""
        return self.steps - self.settle

    def budget(self, step: int, first: int) -> int:
        """How many of `first` ranks may stay after optimiser step 1, 2, …"""
        if step <= self.hold:
            return first
        if step > self.last:
            return self.final
        rest = 1 - (step - self.hold) / (self.last - self.hold)
        return int((first - self.final) * rest**3 + self.final)

    def drops(self, step: int) -> bool:
        """Whether ranks are dropped after that step."""
        return step == self.last or (self.hold < step < self.last and step % self.every == 0)


class Allocator:
    """What AdaLoRA does beside the optimiser: a penalty in the loss, and after each step the masks."""

    def __init__(
        self, layers: Mapping[str, Triplet], schedule: Schedule, orthogonality: float, betas: tuple[float, float]
    ) -> None:
        self.layers, self.schedule, self.orthogonality, self.betas = layers, schedule, orthogonality, betas
        self.first = sum(len(layer.sigma) for layer in layers.values())
        zeros = {f"{name}.{part}": torch.zeros_like(p) for name, part, p in self._parameters()}
        self.mean, self.spread = zeros, {key: tensor.clone() for key, tensor in zeros.items()}
        self.kept = {name: torch.ones_like(layer.sigma, dtype=torch.bool) for name, layer in layers.items()}

    def penalty(self) -> Tensor:
        """What is added to the loss: the weight times the mean over all factors."""
        total = torch.stack([layer.penalty() for layer in self.layers.values()]).sum()
        return self.orthogonality * total / (2 * len(self.layers))

    @torch.no_grad()
    def after(self, step: int) -> None:
        """After optimiser step 1, 2, …, while its gradients are there: measure, and drop what is due."""
        if step < self.schedule.last:
            self._measure()
        if self.schedule.drops(step):
            self._choose(self.schedule.budget(step, self.first))
            self.enforce()
        elif step > self.schedule.last:
            self.enforce()

    @torch.no_grad()
    def enforce(self) -> None:
        """Set the sigmas of the dropped ranks to 0."""
        for name, layer in self.layers.items():
            layer.sigma.masked_fill_(~self.kept[name], 0.0)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by names that no parameter has."""
        tables = {"mean": self.mean, "spread": self.spread, "kept": self.kept}
        return {f"{PREFIX}{kind}/{key}": t for kind, table in tables.items() for key, t in table.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's tensors."""
        for key, tensor in self.state().items():
            tensor.copy_(tensors[key])

    def _parameters(self) -> list[tuple[str, str, nn.Parameter]]:
        parts = ("down", "sigma", "up")
        return [(name, part, getattr(layer, part)) for name, layer in self.layers.items() for part in parts]

    def _measure(self) -> None:
        first, second = self.betas
        for name, part, parameter in self._parameters():
            assert parameter.grad is not None
            now, key = (parameter * parameter.grad).abs(), f"{name}.{part}"
            self.mean[key].mul_(first).add_((1 - first) * now)
            self.spread[key].mul_(second).add_((1 - second) * (now - self.mean[key]).abs())

    def _choose(self, budget: int) -> None:
        importance = {
            name: layer.importance(
                {part: self.mean[f"{name}.{part}"] * self.spread[f"{name}.{part}"] for part in ("down", "sigma", "up")}
            )
            for name, layer in self.layers.items()
        }
        if (dropped := self.first - budget) < 1:
            self.kept = {name: torch.ones_like(kept) for name, kept in self.kept.items()}
            return
        limit = torch.cat(list(importance.values())).kthvalue(dropped).values
        self.kept = {name: scores > limit for name, scores in importance.items()}
