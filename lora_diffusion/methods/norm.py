"""Norm: changes of a normalisation's scale and shift, γ + w_norm and β + b_norm (LyCORIS' `train_norm`).

LayerNorm, GroupNorm and RMSNorm are linear in γ and β, so the change is the same normalisation with `w_norm` and
`b_norm` in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch
from lora_diffusion.layers import is_norm
from lora_diffusion.lora import Part


class NormBranch(Branch):
    """The layer's normalisation with other numbers."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """normalised(x) · w_norm + b_norm."""
        scale, shift = (self.held[key].to(x.dtype) if key in self.held else None for key in ("w_norm", "b_norm"))
        scale = torch.zeros_like(layer.weight, dtype=x.dtype) if scale is None else scale  # type: ignore[arg-type]
        return normalised(layer, x, scale, shift)


def normalised(layer: nn.Module, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """What the layer makes of `x` with another scale and shift, both in the dtype of `x`."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, scale, shift, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, scale, shift, layer.eps)
    eps: Any = layer.eps
    normed = F.rms_norm(x, tuple(scale.shape), scale, eps)
    return normed if shift is None else normed + shift


@dataclass(frozen=True)
class Norm:
    """No settings."""

    name: ClassVar[str] = "norm"
    tensors: ClassVar[Mapping[str, bool]] = {"w_norm": False, "b_norm": False}

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """torch's LayerNorm, GroupNorm and RMSNorm, and Diffusers' own RMSNorm, that have a scale."""
        return is_norm(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """Zeros, a shift where the layer has one."""
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        tensors = {"w_norm": torch.zeros(weight.shape)}
        if isinstance(bias, Tensor):
            tensors["b_norm"] = torch.zeros(weight.shape)
        return LayerAdapter(self.name, tensors)

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where each has the shape of the layer's scale and there is one."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not adapter.tensors:
            return "no tensor; expected w_norm or b_norm"
        wrong = [f"{key} {tuple(t.shape)}" for key, t in adapter.tensors.items() if t.shape != weight.shape]
        return f"{wrong[0]}; expected {tuple(weight.shape)}" if wrong else None

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """1."""
        return 1.0

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return NormBranch(name, adapter.tensors)

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """`w_norm`, float32; zeros where only the shift changes."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return adapter.tensors.get("w_norm", torch.zeros(weight.shape)).float()
