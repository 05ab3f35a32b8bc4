"""A LoRA pair and a change of the bias beside it: W' = W + s · up · down, b' = b + diff_b + s · up_bias.

`diff_b` (out,) as LyCORIS and ComfyUI name it (LightX2V, LTX), `up_bias` (out,) the bias of PEFT's `lora_B` (BFL's
Control LoRAs), which the pair's scale multiplies too; at least one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import by_channel
from lora_diffusion.layers import out_width
from lora_diffusion.lora import Part
from lora_diffusion.methods.dora import DoRABranch
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.methods.ranked import Ranked, check_pair, check_shapes


class BiasedBranch(DoRABranch):
    """The pair's product, without a magnitude, and what is added to the bias."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """s · up · (down x) + diff_b + s · up_bias."""
        change = super().change(layer, x, out)
        if "up_bias" not in self.held:
            return change
        return change + by_channel(layer, self.scale * self.held["up_bias"]).to(change.dtype)


class Biased(Ranked):
    """Settings of new layers: those of the pair."""

    name: ClassVar[str] = "biased"
    tensors: ClassVar[Mapping[str, bool]] = {"down": True, "up": True, "diff_b": False, "up_bias": False}

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """A LoRA pair as it starts, and zeros for the bias of a layer that has one; where it has none, that is LoRA."""
        pair = LoRA(self.rank, self.stored_alpha).fresh(layer, generator)
        if not isinstance(getattr(layer, "bias", None), Tensor):
            return pair
        return replace(pair, method=self.name, tensors={**pair.tensors, "diff_b": torch.zeros(out_width(layer))})

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where the pair fits the layer and every bias has a number for each output."""
        width = (out_width(layer),)
        return check_pair(adapter, layer) or check_shapes(adapter, layer, {"diff_b": width, "up_bias": width})

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank."""
        return LoRA.scale(adapter)

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return BiasedBranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """s · up · down, float32."""
        return LoRA.delta(adapter, layer)
