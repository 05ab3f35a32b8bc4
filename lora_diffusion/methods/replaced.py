"""Set: a normalisation's scale as such, in place of the frozen one. BFL's Control LoRAs have those of queries and keys.

y = base + weight · (normalised(x) · (value - γ))       at weight 1 the scale is `value`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch
from lora_diffusion.layers import frozen_weight, is_norm
from lora_diffusion.lora import Part
from lora_diffusion.methods.norm import normalised


class SetBranch(Branch):
    """The layer's normalisation with what its scale lacks of `value`."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """normalised(x) · (value - γ)."""
        scale = self.constant(lambda: self.held["value"].float() - frozen_weight(layer).float())
        return normalised(layer, x, scale.to(x.dtype))


@dataclass(frozen=True)
class Set:
    """No settings. To train norms take `norm`, which stores differences."""

    name: ClassVar[str] = "set"
    tensors: ClassVar[Mapping[str, bool]] = {"value": True}

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """torch's LayerNorm, GroupNorm and RMSNorm, and Diffusers' own RMSNorm, that have a scale."""
        return is_norm(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """The scale as it is; ones where a plan is made on the meta device."""
        weight = frozen_weight(layer).detach()
        return LayerAdapter(
            self.name, {"value": torch.ones(weight.shape) if weight.is_meta else weight.float().clone()}
        )

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where it has the shape of the layer's scale."""
        found, expected = tuple(adapter.tensors["value"].shape), tuple(frozen_weight(layer).shape)
        return None if found == expected else f"value {found}; expected {expected}"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """1."""
        return 1.0

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return SetBranch(name, adapter.tensors)

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """value - γ, float32."""
        weight = frozen_weight(layer).float()
        return adapter.tensors["value"].to(weight.device).float() - weight
