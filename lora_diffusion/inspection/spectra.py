"""How strong an adapter is and how many directions it uses: ‖ΔW‖ and effective rank.

    LoRA    ΔW = s · U D, thin QR U = Q₁R₁ and Dᵀ = Q₂R₂: s times the singular values of the small R₁R₂ᵀ
    LoHa    (A B) ⊙ (C D) is a product again: rows of A and C, columns of B and D multiplied by pairs, rank r²
    LoKr    the singular values of w₁ ⊗ w₂ are the products of those of w₁ and w₂, each as a LoRA's where it is a pair
    others  of the dense ΔW

What depends on the frozen weight (a magnitude, OFT, (IA)³, GLoRA) is the dense ΔW of a base's layers, where there is
one, and else has none here. The effective rank is exp(−Σ p log p)
with p = σ / Σσ (Roy and Vetterli 2007); among layers with large matrices that of the one of median norm is a block's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.fitting import fit
from lora_diffusion.inspection.blocks import block_of, in_order
from lora_diffusion.layers import frozen_weight, submodule
from lora_diffusion.methods import METHODS, is_dense
from lora_diffusion.methods.loha import tucker
from lora_diffusion.methods.lokr import factors

QUICK = 96  # matrices with a side no longer than this have their singular values found for every layer
LARGEST = 1 << 28  # numbers; the largest layers of FLUX have 2 ** 26
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
    return _told_values(layer) if _is_told(layer) else None


def _told_values(layer: LayerAdapter) -> Tensor:
    return _VALUES[layer.method](_floating(layer)) * abs(METHODS[layer.method].scale(layer))


def _floating(layer: LayerAdapter) -> dict[str, Tensor]:
    return {part: tensor.float() for part, tensor in layer.tensors.items() if tensor.is_floating_point()}


def _is_told(layer: LayerAdapter) -> bool:
    """Whether its own tensors tell how strong it is, and those of no layer that could be."""
    return layer.method in _VALUES and not {"magnitude", "window"} & layer.tensors.keys() and _largest(layer) <= LARGEST


def _largest(layer: LayerAdapter) -> int:
    """A bound of the largest matrix that is made of its factors, in numbers; a pair's is never made."""
    if layer.method not in ("loha", "lokr"):
        return 0
    widths = sorted((width for tensor in layer.tensors.values() for width in tensor.shape), reverse=True)
    return math.prod(widths[:2])


def _leans(layer: LayerAdapter) -> bool:
    known = layer.method in METHODS and layer.method != "norm"
    return known and is_dense(layer.method) and not _is_told(layer)


def _of_pair(tensors: Mapping[str, Tensor]) -> Tensor:
    return _of_product(tensors["up"].flatten(1), tensors["down"].flatten(1))


def _of_tucker_pair(tensors: Mapping[str, Tensor]) -> Tensor:
    inner = torch.einsum("ab...,bi->ai...", tensors["mid"], tensors["down"].flatten(1))
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
    first, second = (
        torch.linalg.svdvals(whole.flatten(1)) if pair is None else _of_product(*pair)
        for whole, pair in zip(factors(tensors), _halves(tensors), strict=True)
    )
    return torch.outer(first, second).flatten().sort(descending=True).values


def _halves(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    """Of each factor of a Kronecker product the pair that it is made of; None where it is whole or has a core."""
    pairs = [(tensors.get(f"{key}_a"), tensors.get(f"{key}_b")) for key in ("w1", "w2")]
    whole = ["w1" in tensors, "w2" in tensors or "t2" in tensors]
    return [
        None if given or a is None or b is None else (a.flatten(1), b.flatten(1))
        for given, (a, b) in zip(whole, pairs, strict=True)
    ]


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


def spectra(adapter: Adapter, models: Mapping[str, nn.Module] | None = None) -> list[Spectrum]:
    """One row a block, of its layers whose strength is known.

    `models` (component -> model), where their layers have weights, tell that of changes which depend on those.
    """
    dense = {site: _dense(layer, live) for site, layer, live in _on_weights(adapter, models or {})}
    told = {(component, name): _strength(layer) for component, name, layer in adapter if _is_told(layer)}
    return _by_block(told | dense)


def by_block(values: Values) -> list[Spectrum]:
    """The same of values that were taken before."""
    known = {place: _Strength(float(found.norm()), lambda found=found: found) for place, found in values.items()}
    return _by_block(known)


def _by_block(strengths: Mapping[tuple[str, str], _Strength]) -> list[Spectrum]:
    groups: dict[tuple[str, str], list[_Strength]] = {}
    for (component, name), strength in strengths.items():
        groups.setdefault((component, block_of(name)), []).append(strength)
    order = sorted(groups, key=lambda group: (group[0], in_order(group[1])))  # as in the coverage report
    return [
        Spectrum(component, block, math.hypot(*(one.norm for one in found)), _median_rank(found), len(found))
        for component, block in order
        for found in [groups[component, block]]
    ]


def leaning(adapter: Adapter) -> Adapter:
    """Its layers whose change depends on the frozen weight, alone."""
    layers = {
        component: {name: layer for name, layer in of.items() if _leans(layer)}
        for component, of in adapter.layers.items()
    }
    return replace(adapter, layers={component: of for component, of in layers.items() if of}, embeddings={})


@dataclass(frozen=True)
class _Strength:
    """One layer's: its norm, and what makes its singular values."""

    norm: float
    values: Callable[[], Tensor]
    dear: bool = False  # they are those of a large matrix


def _strength(layer: LayerAdapter) -> _Strength:
    """Of a layer whose own tensors tell it; singular values of large matrices only where they are asked for."""
    tensors = _floating(layer)
    side, norm = _SIZES[layer.method](tensors) if layer.method in _SIZES and "t1" not in tensors else (0, 0.0)
    if side <= QUICK:
        values = _told_values(layer)
        return _Strength(float(values.norm()), lambda: values)
    return _Strength(norm * abs(METHODS[layer.method].scale(layer)), lambda: _told_values(layer), dear=True)


def _size_of_pair(tensors: Mapping[str, Tensor]) -> tuple[int, float]:
    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    if len(down) <= QUICK:
        return len(down), 0.0
    return len(down), float(((up.T @ up).double() * (down @ down.T).double()).sum().clamp_min(0).sqrt())


def _size_of_hadamard(tensors: Mapping[str, Tensor]) -> tuple[int, float]:
    a, b, c, d = (tensors[part].flatten(1) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    side = min(a.shape[1] * c.shape[1], len(a), b.shape[1])
    return side, float(((a @ b) * (c @ d)).norm()) if side > QUICK else 0.0


def _size_of_kronecker(tensors: Mapping[str, Tensor]) -> tuple[int, float]:
    both = [factor.flatten(1) for factor in factors(tensors)]
    pairs = zip(both, _halves(tensors), strict=True)
    ranks = [min(*whole.shape, *([] if pair is None else [len(pair[1])])) for whole, pair in pairs]
    return max(ranks), math.prod(float(factor.norm()) for factor in both)


def _size_of_dense(tensors: Mapping[str, Tensor]) -> tuple[int, float]:
    diff = tensors["diff"].flatten(1) if "diff" in tensors else torch.zeros(1, 1)
    return min(diff.shape), float(diff.norm())


#: method -> the smaller side of the matrix whose singular values are to be found, and ‖ΔW‖ without the scale
_SIZES: dict[str, Callable[[Mapping[str, Tensor]], tuple[int, float]]] = {
    "lora": _size_of_pair,
    "biased": _size_of_pair,
    "loha": _size_of_hadamard,
    "lokr": _size_of_kronecker,
    "full": _size_of_dense,
}


def _dense(layer: LayerAdapter, live: nn.Module) -> _Strength:
    def delta() -> Tensor:  # made anew, so that one at a time is in memory
        return METHODS[layer.method].delta(layer, live).float().flatten(1)

    return _Strength(float(delta().norm()), lambda: torch.linalg.svdvals(delta()), dear=True)


def _median_rank(found: list[_Strength]) -> float:
    """Of large matrices the one of median norm stands for all of its block."""
    dense = sorted((one for one in found if one.dear), key=lambda one: one.norm)
    ranks = [effective_rank(one.values()) for one in found if not one.dear]
    ranks += [effective_rank(dense[len(dense) // 2].values())] * len(dense) if dense else []
    return sorted(ranks)[len(ranks) // 2]


def _on_weights(
    adapter: Adapter, models: Mapping[str, nn.Module]
) -> Iterator[tuple[tuple[str, str], LayerAdapter, nn.Module]]:
    if not models:
        return
    for site, layer in fit(leaning(adapter), models, finite=True).layers.items():
        live = submodule(models[site[0]], site[1])
        if not frozen_weight(live).is_meta:
            yield site, layer, live
