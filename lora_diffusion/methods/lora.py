"""LoRA: ΔW = (alpha / rank) · up · down, on linear layers and, as two convolutions, on convolutions.

Hu et al. 2021, arXiv 2106.09685; the convolution form is LoCon's (down keeps the kernel, up is 1x1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import is_convolution, is_linear, kernel_shape, out_width, weight_shape
from lora_diffusion.lora import Pair


@dataclass(frozen=True)
class LoRA:
    """Settings of new LoRA layers: `rank` >= 1, `alpha` (None: the rank, so that the scale is 1)."""

    rank: int = 16
    alpha: float | None = None

    name: ClassVar[str] = "lora"
    tensors: ClassVar[Mapping[str, bool]] = {"down": True, "up": True}

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora: rank is {self.rank}, expected at least 1")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ConfigError(f"lora: alpha is {self.alpha}, expected a finite number")

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Linear layers of any precision and one-group 2-D convolutions."""
        return is_linear(layer) or is_convolution(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`down` Kaiming-uniform with a = √5 as in microsoft/LoRA, `up` zero, float32 on the CPU."""
        down = torch.empty(self.rank, *kernel_shape(layer))
        bound = 1 / math.sqrt(down[0].numel())  # kaiming_uniform_(a=√5)
        down.uniform_(-bound, bound, generator=generator)
        up = torch.zeros(out_width(layer), self.rank, *(1 for _ in kernel_shape(layer)[1:]))
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return LayerAdapter(self.name, {"down": down, "up": up}, alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where the pair fits the layer (linear pairs also come as 1x1 convolutions, and the reverse)."""
        down, up = adapter.tensors["down"], adapter.tensors["up"]
        rank, row, width = down.shape[0], math.prod(kernel_shape(layer)), out_width(layer)
        if rank and down.numel() == rank * row and up.numel() == rank * width and up.shape[:2] == (width, rank):
            return None
        found = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        return f"{found}; expected down (r, {row}), up ({width}, r) for a weight of {weight_shape(layer)}"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank; 1 where there is no alpha."""
        rank = adapter.tensors["down"].shape[0]
        return 1.0 if adapter.alpha is None else adapter.alpha / rank

    @classmethod
    def pair(cls, name: str, adapter: LayerAdapter) -> Pair:
        """The pair to pack into a slot under an adapter's name."""
        return Pair(name, adapter.tensors["down"], adapter.tensors["up"], cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """scale · up · down in float32, in the shape of the layer's weight."""
        down, up = adapter.tensors["down"].float().flatten(1), adapter.tensors["up"].float().flatten(1)
        return (cls.scale(adapter) * (up @ down)).reshape(weight_shape(layer))
