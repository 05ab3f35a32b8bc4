"""(IA)³: every output channel, or input channel, times 1 + weight.

Liu et al. 2022, arXiv 2205.05638; stored as LyCORIS does: `weight` (out,) or (in,), on convolutions (1, d, 1, 1),
which is 0 in a fresh layer, and `on_input` 0 or 1. The paper scales keys, values and the inner feed-forward
activation; which layers those are is a matter of targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, by_channel, product, without_bias
from lora_diffusion.layers import is_convolution, is_linear, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.quantize import dequantize


class IA3Branch(Branch):
    """weight · W x, or W (weight · x)."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(name, tensors)
        self.on_input = bool(tensors["on_input"].item())

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The bias is not scaled."""
        factor = by_channel(layer, self.held["weight"])
        return (
            product(layer, x * factor.to(x.dtype)) if self.on_input else without_bias(layer, out) * factor.to(x.dtype)
        )


@dataclass(frozen=True)
class IA3:
    """Settings of new layers: whether the input is scaled instead of the output."""

    on_input: bool = False

    name: ClassVar[str] = "ia3"
    tensors: ClassVar[Mapping[str, bool]] = {"weight": True, "on_input": True}

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Linear layers of any precision and one-group convolutions."""
        return is_linear(layer) or is_convolution(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """Zeros."""
        shape = weight_shape(layer)
        size = shape[1] if self.on_input else shape[0]
        weight = torch.zeros((size,) if len(shape) == 2 else (1, size, *(1 for _ in shape[2:])))
        return LayerAdapter(self.name, {"weight": weight, "on_input": torch.tensor(int(self.on_input))})

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where there is one number a channel of the side it says."""
        weight, flag, shape = adapter.tensors["weight"], adapter.tensors["on_input"], weight_shape(layer)
        if flag.numel() != 1 or flag.item() not in (0, 1):
            return f"on_input {flag.flatten()[:3].tolist()}; expected one number, 0 or 1"
        expected = shape[1] if flag.item() else shape[0]
        if weight.numel() == expected:
            return None
        return f"weight {tuple(weight.shape)}; expected {expected} numbers for a weight of {shape}"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """1."""
        return 1.0

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return IA3Branch(name, adapter.tensors)

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """W times `weight` along its axis."""
        base = dequantize(layer)
        shape = [1] * base.dim()
        shape[1 if adapter.tensors["on_input"].item() else 0] = -1
        return base * adapter.tensors["weight"].float().reshape(shape).to(base.device)
