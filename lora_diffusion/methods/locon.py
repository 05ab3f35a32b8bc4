"""LoCon in CP/Tucker form: a convolution as 1x1, the kernel on `rank` channels, 1x1.

    ΔW[o, i, k, l] = s · Σ_ab up[o, a] · mid[a, b, k, l] · down[b, i]

Yeh et al. 2023 (LyCORIS), arXiv 2309.14859; `down` (rank, in), `mid` (rank, rank, kh, kw), `up` (out, rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import convolved, pointwise
from lora_diffusion.layers import is_convolution, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.deltas import DeltaBranch, decomposed
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_shapes, kaiming
from lora_diffusion.quantize import dequantize


class LoConBranch(DeltaBranch):
    """Three small convolutions in a row."""

    def delta(self, layer: nn.Module) -> Tensor:
        """The formula above."""
        return self.scale * torch.einsum(
            "ab...,oa,bi->oi...", self.held["mid"], self.held["up"].flatten(1), self.held["down"].flatten(1)
        )

    def delta_product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """s · up · (mid * (down · x)); only `mid` has the layer's stride and padding."""
        inner = convolved(layer, pointwise(layer, x, self.held["down"]), self.held["mid"].to(x.dtype))
        return self.scale * pointwise(layer, inner, self.held["up"])


@dataclass(frozen=True)
class LoCon(Ranked):
    """Settings of new layers: `rank`, `alpha`."""

    name: ClassVar[str] = "locon"
    tensors: ClassVar[Mapping[str, bool]] = {"down": True, "mid": True, "up": True, "magnitude": False, "diff_b": False}

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Convolutions alone."""
        return is_convolution(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`down` and `mid` Kaiming-uniform, `up` zero."""
        out, width, *kernel = weight_shape(layer)
        ones = (1,) * len(kernel)
        tensors = {
            "down": kaiming((self.rank, width, *ones), generator),
            "mid": kaiming((self.rank, self.rank, *kernel), generator),
            "up": torch.zeros(out, self.rank, *ones),
        }
        return LayerAdapter(self.name, tensors, self.stored_alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where all three fit the layer."""
        out, width, *kernel = weight_shape(layer)
        rank = adapter.tensors["down"].shape[0]
        expected = {"down": (rank, width), "mid": (rank, rank, *kernel), "up": (out, rank)}
        return check_shapes(adapter, layer, expected)

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank."""
        return alpha_over(adapter, adapter.tensors["down"].shape[0])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return LoConBranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The formula above, float32; with a magnitude the decomposed change."""
        down, mid, up = (adapter.tensors[key].float() for key in ("down", "mid", "up"))
        delta = torch.einsum("ab...,oa,bi->oi...", mid, up.flatten(1), down.flatten(1)) * cls.scale(adapter)
        return decomposed(dequantize(layer), delta, adapter.tensors.get("magnitude"))
