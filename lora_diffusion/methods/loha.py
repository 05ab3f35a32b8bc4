"""LoHa: ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b), an elementwise product of two low-rank matrices: rank r².

Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; LyCORIS, arXiv 2309.14859. `w·_a` (out, rank), `w·_b`
(rank, in · kh · kw); in Tucker form `t·` (rank, rank, kh, kw) stands between and `w·_a` is (rank, out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.layers import kernel_shape, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.deltas import DeltaBranch, decomposed
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_shapes
from lora_diffusion.quantize import dequantize


def rebuilt(tensors: Mapping[str, Tensor], layer: nn.Module) -> Tensor:
    """(w1_a w1_b) ⊙ (w2_a w2_b) in the shape of the layer's weight."""
    return (_half(tensors, "1") * _half(tensors, "2")).reshape(weight_shape(layer))


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij t[i, j, …] a[i, p] b[j, q] -> (p, q, …)."""
    return torch.einsum("ij...,ip,jq->pq...", t, a.flatten(1), b.flatten(1))


def _half(tensors: Mapping[str, Tensor], which: str) -> Tensor:
    a, b = tensors[f"w{which}_a"], tensors[f"w{which}_b"]
    return tucker(tensors[f"t{which}"], a, b) if f"t{which}" in tensors else a.flatten(1) @ b.flatten(1)


class LoHaBranch(DeltaBranch):
    """ΔW rebuilt for the call."""

    def delta(self, layer: nn.Module) -> Tensor:
        """The formula above."""
        return self.scale * rebuilt(dict(self.held.items()), layer)


@dataclass(frozen=True)
class LoHa(Ranked):
    """Settings of new LoHa layers: `rank`, `alpha`, and `tucker` for convolutions with a kernel."""

    tucker: bool = False

    name: ClassVar[str] = "loha"
    tensors: ClassVar[Mapping[str, bool]] = {
        **dict.fromkeys(("w1_a", "w1_b", "w2_a", "w2_b"), True),
        **dict.fromkeys(("t1", "t2", "magnitude", "diff_b"), False),
    }

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """As LyCORIS: `w1_a` zero, `w·_b` normal, `w2_a` and `t·` normal with deviation 0.1."""
        kernel = kernel_shape(layer)[1:]
        core = self.tucker and math.prod(kernel) > 1
        deviations = {"w1_a": 0.0, "w1_b": 1.0, "w2_a": 0.1, "w2_b": 1.0, "t1": 0.1, "t2": 0.1}
        tensors = {
            key: deviations[key] * torch.randn(shape, generator=generator)
            for key, shape in _shapes(layer, self.rank, core=core).items()
        }
        return LayerAdapter(self.name, tensors, self.stored_alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where both products fit the layer."""
        rank = adapter.tensors["w1_b"].shape[0]
        core = {"t1", "t2"} & adapter.tensors.keys()
        if len(core) == 1:
            return f"only {core.pop()} of t1 and t2; expected both or none"
        return check_shapes(adapter, layer, _shapes(layer, rank, core=bool(core)))

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank."""
        return alpha_over(adapter, adapter.tensors["w1_b"].shape[0])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return LoHaBranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The formula above, float32; with a magnitude the decomposed change."""
        delta = cls.scale(adapter) * rebuilt({key: t.float() for key, t in adapter.tensors.items()}, layer)
        return decomposed(dequantize(layer), delta, adapter.tensors.get("magnitude"))


def _shapes(layer: nn.Module, rank: int, *, core: bool) -> dict[str, tuple[int, ...]]:
    out, width, *kernel = weight_shape(layer)
    if core:
        a, b, t = (rank, out), (rank, width), (rank, rank, *kernel)
        return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b, "t1": t, "t2": t}
    a, b = (out, rank), (rank, width * math.prod(kernel))
    return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
