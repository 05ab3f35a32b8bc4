"""DoRA: a low-rank pair and a magnitude, W' = m · (W + s · up · down) / ‖W + s · up · down‖, norms by row.

Liu et al. 2024, arXiv 2402.09353. Over 4 bits the norm is never taken of a dense weight twice: with the rows w of
W, u of `up`, and A = down,

    ‖w + s u A‖² = ‖w‖² + 2 s u · (W Aᵀ) + s² u (A Aᵀ) uᵀ

where ‖w‖² is kept from the first call and W Aᵀ is the frozen layer's own product with `rank` rows. The strength
of a stack is linear, base + weight · (adapted - base); at 1 that is PEFT's and LyCORIS' DoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, convolved, pointwise, product
from lora_diffusion.layers import CONVOLUTIONS, compute_dtype, kernel_shape, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.deltas import DeltaBranch, decomposed, squares, weight_norm
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.methods.ranked import Ranked, check_beside, check_pair, on_host
from lora_diffusion.quantize import dequantize


class DoRABranch(DeltaBranch):
    """`down`, `up`, `magnitude`: (out,), or (1, in[, 1, 1]) for one an input, which needs the dense weight."""

    squares: Tensor | None = None  # ‖w‖² of every row of the frozen weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Branch:
        self.squares = None  # the weight that they were taken of may be rounded
        return super()._apply(fn, recurse)

    def delta(self, layer: nn.Module) -> Tensor:
        """s · up · down."""
        down, up = self.held["down"].flatten(1), self.held["up"].flatten(1)
        return (self.scale * (up @ down)).reshape(weight_shape(layer))

    def delta_product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """s · up · (down x)."""
        down = self.held["down"].reshape(-1, *kernel_shape(layer))
        return self.scale * pointwise(layer, convolved(layer, x, down.to(x.dtype)), self.held["up"])

    def norm(self, layer: nn.Module, *, by_input: bool) -> Tensor:
        """‖W + ΔW‖ by the Gram form above; by column from the dense weight."""
        if by_input:
            return super().norm(layer, by_input=True)
        if self.squares is None or self.squares.device != self.held["up"].device:
            self.squares = squares(dequantize(layer))
        down, up = self.held["down"].flatten(1).float(), self.held["up"].flatten(1).float()
        if isinstance(layer, CONVOLUTIONS):
            rows = down @ dequantize(layer).flatten(1).t()
        else:
            rows = product(layer, self.held["down"].flatten(1).to(compute_dtype(layer))).float()
        crossed, gram = (rows.t() * up).sum(dim=1), ((up @ (down @ down.t())) * up).sum(dim=1)
        return (self.squares + 2 * self.scale * crossed + self.scale**2 * gram).clamp_min(0).sqrt()


@dataclass(frozen=True)
class DoRA(Ranked):
    """Settings of new DoRA layers: as LoRA, and whether the magnitude is one an input instead of one an output."""

    by_input: bool = False

    name: ClassVar[str] = "dora"
    tensors: ClassVar[Mapping[str, bool]] = {"down": True, "up": True, "magnitude": True, "diff_b": False}

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """A LoRA pair as it starts, and the norms of the frozen weight."""
        pair = LoRA(self.rank, self.stored_alpha).fresh(layer, generator)
        magnitude = on_host(weight_norm(dequantize(layer), by_input=self.by_input))
        if self.by_input:
            magnitude = magnitude.reshape(1, -1, *(1 for _ in kernel_shape(layer)[1:]))
        return replace(pair, method=self.name, tensors={**pair.tensors, "magnitude": magnitude})

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where pair, magnitude and change of the bias fit the layer."""
        return check_pair(adapter, layer) or check_beside(adapter, layer)

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank."""
        return LoRA.scale(adapter)

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return DoRABranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """m · (W + ΔW) / ‖W + ΔW‖ - W, float32."""
        return decomposed(dequantize(layer), LoRA.delta(adapter, layer), adapter.tensors["magnitude"])
