"""How strong an adapter is and how many directions it uses: ‖ΔW‖ and effective rank, without forming ΔW.

For ΔW = s · U D with thin QR U = Q₁R₁ and Dᵀ = Q₂R₂, the singular values of ΔW are s times those of the small
R₁R₂ᵀ. The effective rank is exp(−Σ p log p) with p = σ / Σσ (Roy and Vetterli 2007).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.inspection.blocks import block_of


@dataclass(frozen=True)
class Spectrum:
    """One block's strength: root of Σ‖ΔW‖²; the median effective rank of its layers; layers counted."""

    component: str
    block: str
    norm: float
    effective_rank: float
    layers: int


def singular_values(layer: LayerAdapter) -> Tensor | None:
    """Singular values of ΔW, descending, float32 (rank,); None for methods that are no low-rank pair."""
    if layer.method != "lora":
        return None
    down, up = (layer.tensors[part].float().flatten(1) for part in ("down", "up"))
    alpha = down.shape[0] if layer.alpha is None else layer.alpha
    first, second = torch.linalg.qr(up, mode="r")[1], torch.linalg.qr(down.T, mode="r")[1]
    return torch.linalg.svdvals(first @ second.T) * abs(alpha / down.shape[0])


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values; 0 where all are zero."""
    total = values.sum().item()
    if total <= 0:
        return 0.0
    shares = values / total
    return math.exp(-torch.special.xlogy(shares, shares).sum().item())


def spectra(adapter: Adapter) -> list[Spectrum]:
    """One row a block, of its `lora` layers."""
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for component, name, layer in adapter:
        values = singular_values(layer)
        if values is not None:
            groups.setdefault((component, block_of(name)), []).append(values)
    return [
        Spectrum(
            component,
            block,
            math.sqrt(sum(v.square().sum().item() for v in found)),
            sorted(map(effective_rank, found))[len(found) // 2],
            len(found),
        )
        for (component, block), found in groups.items()
    ]
