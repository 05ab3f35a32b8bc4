"""Fusing: the weighted sum written into the frozen weights, and the originals back bit for bit.

The originals are kept in the host's memory, not computed back: bf16 weights would not survive W + D - D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import frozen_weight
from lora_diffusion.lora import Slot


@dataclass
class Fusion:
    """What was fused: each slot, its layer's weight and the original values."""

    kept: list[tuple[Slot, Tensor, Tensor]]

    def undo(self) -> None:
        """Write the originals back and wake the slots."""
        for slot, weight, original in self.kept:
            weight.data.copy_(original)
            slot.idle = False
        self.kept = []


def fuse(layers: Mapping[str, tuple[nn.Module, Slot]]) -> Fusion:
    """Merge each slot into its layer's weight (name -> layer, slot) and put it to sleep.

    ConfigError, and nothing changed, where a weight is not stored as floating-point numbers.
    """
    awake = {name: pair for name, pair in layers.items() if not pair[1].idle}
    for name, (layer, _) in awake.items():
        weight = frozen_weight(layer)
        if not weight.is_floating_point() or weight.dim() < 2 or weight.is_meta:
            raise ConfigError(f"fuse: {name} ({type(layer).__name__}) is quantised or offloaded; use it unfused")
    kept: list[tuple[Slot, Tensor, Tensor]] = []
    with torch.no_grad():
        for layer, slot in awake.values():
            weight = frozen_weight(layer)
            kept.append((slot, weight, weight.detach().to("cpu", copy=True)))
            weight.data.copy_(slot.merged(weight))
            slot.idle = True
    return Fusion(kept)
