"""How strong an adapter is and how many directions it uses: ‖ΔW‖ and effective rank, without the base.

    LoRA    ΔW = s · U D, thin QR U = Q₁R₁ and Dᵀ = Q₂R₂: s times the singular values of the small R₁R₂ᵀ
    LoHa    (A B) ⊙ (C D) is a product again: rows of A and C, columns of B and D multiplied by pairs, rank r²
    LoKr    the singular values of w₁ ⊗ w₂ are the products of those of w₁ and w₂
    others  of the dense ΔW

What depends on the frozen weight (a magnitude, OFT, (IA)³, GLoRA) has none here. The effective rank is exp(−Σ p log p)
with p = σ / Σσ (Roy and Vetterli 2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.inspection.blocks import block_of
from lora_diffusion.methods import METHODS
from lora_diffusion.methods.loha import tucker
from lora_diffusion.methods.lokr import factors

Values = Mapping[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """One block's strength: root of Σ‖ΔW‖²; the median effective rank of its layers; layers counted."""

    component: str
    block: str
    norm: float
    effective_rank: float
    layers: int


def singular_values(layer: LayerAdapter) -> Tensor | None:
    """Singular values of ΔW, descending, float32; None for methods whose ΔW depends on the frozen weight."""
    tensors = {part: tensor.float() for part, tensor in layer.tensors.items() if tensor.is_floating_point()}
    if layer.method not in _VALUES or {"magnitude", "window"} & layer.tensors.keys():
        return None
    return _VALUES[layer.method](tensors) * abs(METHODS[layer.method].scale(layer))


def _of_pair(tensors: Mapping[str, Tensor]) -> Tensor:
    return _of_product(tensors["up"].flatten(1), tensors["down"].flatten(1))


def _of_tucker_pair(tensors: Mapping[str, Tensor]) -> Tensor:
    inner = torch.einsum("abkl,bi->aikl", tensors["mid"], tensors["down"].flatten(1))
    return _of_product(tensors["up"].flatten(1), inner.flatten(1))


def _of_hadamard(tensors: Mapping[str, Tensor]) -> Tensor:
    if "t1" in tensors:
        first, second = (tucker(tensors[f"t{n}"], tensors[f"w{n}_a"], tensors[f"w{n}_b"]) for n in (1, 2))
        return torch.linalg.svdvals((first * second).flatten(1))
    a, b, c, d = (tensors[part].flatten(1) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if a.shape[1] * c.shape[1] >= min(len(a), b.shape[1]):
        return torch.linalg.svdvals((a @ b) * (c @ d))
    up, down = a[:, :, None] * c[:, None, :], b[:, None, :] * d[None, :, :]
    return _of_product(up.flatten(1), down.flatten(0, 1))


def _of_kronecker(tensors: Mapping[str, Tensor]) -> Tensor:
    first, second = (torch.linalg.svdvals(factor.flatten(1)) for factor in factors(tensors))
    return torch.outer(first, second).flatten().sort(descending=True).values


def _of_dense(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.linalg.svdvals(tensors["diff"].flatten(1)) if "diff" in tensors else torch.zeros(1)


def _of_product(up: Tensor, down: Tensor) -> Tensor:
    first, second = torch.linalg.qr(up, mode="r")[1], torch.linalg.qr(down.T, mode="r")[1]
    return torch.linalg.svdvals(first @ second.T)


_VALUES: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "lora": _of_pair,
    "biased": _of_pair,
    "locon": _of_tucker_pair,
    "loha": _of_hadamard,
    "lokr": _of_kronecker,
    "full": _of_dense,
}


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values; 0 where all are zero."""
    total = values.sum().item()
    if total <= 0:
        return 0.0
    shares = values / total
    return math.exp(-torch.special.xlogy(shares, shares).sum().item())


def all_values(adapter: Adapter) -> Values:
    """(component, layer) -> singular values, of the layers that have some here."""
    found = (((component, name), singular_values(layer)) for component, name, layer in adapter)
    return {place: values for place, values in found if values is not None}


def spectra(adapter: Adapter) -> list[Spectrum]:
    """One row a block, of its layers that have singular values here."""
    return by_block(all_values(adapter))


def by_block(values: Values) -> list[Spectrum]:
    """The same of values that were taken before."""
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for (component, name), of_layer in values.items():
        groups.setdefault((component, block_of(name)), []).append(of_layer)
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
