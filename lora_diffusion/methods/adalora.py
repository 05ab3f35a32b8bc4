"""AdaLoRA: ΔW = (alpha / rank) · up · diag(sigma) · down, whose least important ranks are dropped while training.

Zhang et al. 2023, arXiv 2303.10512: an SVD in form, its factors held near orthogonal by a penalty. `down` (rank, in),
`sigma` (rank,), `up` (out, rank); on convolutions as LoRA. Files hold what is left as a plain LoRA, each layer with
a rank of its own. Which ranks go when is `allocating.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import convolved, pointwise
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import kernel_shape, out_width, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.allocating import Allocator, Schedule, Triplet
from lora_diffusion.methods.deltas import DeltaBranch
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_pair


class AdaLoRABranch(DeltaBranch):
    """`down`, `sigma`, `up`."""

    def delta(self, layer: nn.Module) -> Tensor:
        """The formula above."""
        return (self.scale * (self.held["up"].flatten(1) @ self._scaled())).reshape(weight_shape(layer))

    def delta_product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """s · up · (diag(sigma) down · x)."""
        down = self._scaled().reshape(-1, *kernel_shape(layer)).to(x.dtype)
        return self.scale * pointwise(layer, convolved(layer, x, down), self.held["up"])

    def _scaled(self) -> Tensor:
        return self.held["sigma"][:, None] * self.held["down"].flatten(1)


@dataclass(frozen=True)
class AdaLoRA(Ranked):
    """Settings of new layers: as LoRA, `rank` being what each layer begins with, and how the ranks are given out.

    `final_rank` is the mean rank of the layers in the end (None: two thirds of `rank`). For `hold` optimiser steps all
    ranks stay, for the last `settle` no more are dropped (None: a tenth and three tenths of the run); in between, every
    `every` steps, the least important go. `orthogonality` weighs the penalty. `beta_mean` and `beta_spread` smooth
    the importance and its uncertainty.
    """

    final_rank: int | None = None
    hold: int | None = None
    settle: int | None = None
    every: int = 1
    orthogonality: float = 0.5
    beta_mean: float = 0.85
    beta_spread: float = 0.85

    name: ClassVar[str] = "adalora"
    tensors: ClassVar[Mapping[str, bool]] = {"down": True, "sigma": True, "up": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_rank is not None and not 0 < self.final_rank <= self.rank:
            raise ConfigError(f"adalora: final_rank is {self.final_rank}, expected 1 to the rank, {self.rank}")
        if self.every < 1 or not 0 <= self.orthogonality < math.inf or min(self.hold or 0, self.settle or 0) < 0:
            raise ConfigError(f"adalora: {self}; expected every >= 1 and no negative numbers")
        if not (0 < self.beta_mean < 1 and 0 < self.beta_spread < 1):
            raise ConfigError(f"adalora: betas {self.beta_mean} and {self.beta_spread}, expected between 0 and 1")

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`down` and `up` normal with deviation 0.02, as the paper's code; `sigma` zero."""
        row = kernel_shape(layer)
        tensors = {
            "down": torch.empty(self.rank, *row).normal_(std=0.02, generator=generator),
            "sigma": torch.zeros(self.rank),
            "up": torch.empty(out_width(layer), self.rank, *(1 for _ in row[1:])).normal_(
                std=0.02, generator=generator
            ),
        }
        return LayerAdapter(self.name, tensors, self.stored_alpha, "tensor")

    def course(self, layers: Mapping[str, Mapping[str, nn.Parameter]], steps: int) -> Allocator:
        """What has to be done beside the optimiser in a run of `steps`. ConfigError for one too short."""
        hold = steps // 10 if self.hold is None else self.hold
        settle = 3 * steps // 10 if self.settle is None else self.settle
        if hold >= steps - settle:
            raise ConfigError(f"adalora: hold {hold} and settle {settle} leave none of {steps} steps to drop ranks in")
        final = max(1, 2 * self.rank // 3) if self.final_rank is None else self.final_rank
        schedule = Schedule(steps, hold, settle, self.every, final * len(layers))
        triplets = {name: Triplet(**held) for name, held in layers.items()}
        return Allocator(triplets, schedule, self.orthogonality, (self.beta_mean, self.beta_spread))

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where the pair fits the layer and there is a value a rank."""
        sigma, rank = adapter.tensors["sigma"], adapter.tensors["down"].shape[0]
        if sigma.shape == (rank,):
            return check_pair(adapter, layer)
        return f"sigma {tuple(sigma.shape)}; expected ({rank},) for down {tuple(adapter.tensors['down'].shape)}"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank, the rank of the tensors."""
        return alpha_over(adapter, adapter.tensors["down"].shape[0])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return AdaLoRABranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The formula above, float32."""
        down, sigma, up = (adapter.tensors[key].float() for key in ("down", "sigma", "up"))
        return (cls.scale(adapter) * (up.flatten(1) @ (sigma[:, None] * down.flatten(1)))).reshape(weight_shape(layer))

    @classmethod
    def written(cls, adapter: LayerAdapter, *, whole: bool = False) -> LayerAdapter | None:
        """The ranks whose sigma is not 0 as a plain LoRA of the same scale; None where there is none left.

        `whole` keeps all.
        """
        down, sigma, up = (adapter.tensors[key] for key in ("down", "sigma", "up"))
        kept = torch.ones_like(sigma, dtype=torch.bool) if whole else sigma != 0
        if not (rank := int(kept.sum())):
            return None
        scaled = sigma[kept].view(-1, *(1 for _ in down.shape[1:])) * down[kept]
        tensors = {"down": scaled, "up": up[:, kept].contiguous()}
        return LayerAdapter("lora", tensors, cls.scale(adapter) * rank, adapter.alpha_source)

    @classmethod
    def resumed(cls, written: LayerAdapter | None, fresh: LayerAdapter) -> LayerAdapter:
        """The reverse: a LoRA of at most the fresh layer's rank, with sigmas of 1; the ranks beyond it have 0."""
        if written is None:
            return fresh
        rank, free = written.tensors["down"].shape[0], fresh.tensors
        missing = free["sigma"].shape[0] - rank
        if written.method != "lora" or missing < 0:
            return written  # which does not fit, and is said to
        ratio = alpha_over(written, rank) / cls.scale(fresh) if math.isfinite(cls.scale(fresh)) else 1.0
        tensors = {
            "down": torch.cat([written.tensors["down"], free["down"][rank:].to(written.tensors["down"])]),
            "sigma": torch.tensor([ratio] * rank + [0.0] * missing),
            "up": torch.cat([written.tensors["up"], free["up"][:, rank:].to(written.tensors["up"])], dim=1),
        }
        return LayerAdapter(cls.name, tensors, fresh.alpha, fresh.alpha_source)
