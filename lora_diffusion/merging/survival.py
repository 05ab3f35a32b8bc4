"""How much of a delta D is left when W + D is rounded to NF4 in the place of W.

    E = Q(W + D) - Q(W)                what the rounded weights change by
    share  = <E, D> / <D, D>           how long E is along D: 1 on average, however coarse the grid is
    cosine = <E, D> / |E| |D|          how much of E is D and how much is noise of the rounding

over all quantised layers that adapters are on. The share alone hides the noise: at |D| = 0.01 |W| most numbers keep
their place on the grid and a few jump by far more than D asks for, which comes to a share of 0.99 and a cosine of 0.2.
The cosine alone hides a change that only grew faint. So the lower of both counts. Not the relative error |E - D| / |D|,
whose noise Q(W) alone has too: 0.1 of it would ask for a delta as large as the weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import DENOISERS
from lora_diffusion.fusing import fused_weight
from lora_diffusion.quantize import dequantize
from lora_diffusion.quantize.layers import four_bit
from lora_diffusion.stack import AdapterStack


@dataclass(frozen=True)
class Survival:
    """Share and cosine of the delta in what a rounding leaves of it (above); both 1 where nothing is rounded."""

    share: float = 1.0
    cosine: float = 1.0

    @property
    def least(self) -> float:
        """The lower of both, by which a bake is judged."""
        return min(self.share, self.cosine)

    def __str__(self) -> str:
        return f"{self.share:.2f} of the delta at a cosine of {self.cosine:.2f} to it"


def survival(
    denoiser: nn.Module, stack: AdapterStack, small: Collection[str], held: Mapping[str, nn.Module] | None = None
) -> Survival:
    """What NF4 would keep of the stack's delta on the layers `small` of a dense denoiser.

    `held`: the layers that were quantised before the denoiser was made dense, which stand for their own Q(W).
    """
    along = whole = squares = 0.0
    component, slots = next((component, of) for component, of in stack.slots.items() if component in DENOISERS)
    for name, slot in slots.items():
        layer = denoiser.get_submodule(name)
        if isinstance(layer, nn.Linear) and name in small:
            merged = fused_weight(layer, slot, stack.shares(component, name))
            delta = merged - layer.weight
            before = layer.weight if held and name in held else _rounded(layer, layer.weight)
            change = _rounded(layer, merged) - before
            along += float((change * delta).sum())
            whole += float(delta.square().sum())
            squares += float(change.square().sum())
    if not whole:
        return Survival()
    return Survival(along / whole, along / math.sqrt(whole * squares) if squares else 0.0)


def _rounded(layer: nn.Linear, weight: Tensor) -> Tensor:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
    device = torch.device("cpu")
    return dequantize(four_bit(dense, device=device, dtype=torch.float32, double_quant=True, block_size=64))
