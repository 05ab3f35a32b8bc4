"""GLoRA as LyCORIS has it: ΔW = s · (b1 b2 + W a1 a2), a pair beside the layer and a pair before it.

Chavan et al. 2023, arXiv 2306.07967, without its prompt terms. `a1` (in, rank), `a2` (rank, in), `b1`
(out, rank), `b2` (rank, in[, kh, kw]); on convolutions `a1`, `a2` act on channels. Files of 2023 have the two of each
pair the other way round, which their shapes give away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, convolved, pointwise, product
from lora_diffusion.layers import weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_shapes, kaiming
from lora_diffusion.quantize import dequantize


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names: those of 2023, whose inner sides do not meet, swap 1 and 2."""
    rank = tensors["a1"].shape[1]
    if tensors["b1"].shape[1] == rank == tensors["a2"].shape[0] == tensors["b2"].shape[0]:
        return dict(tensors)
    return {"a1": tensors["a2"], "a2": tensors["a1"], "b1": tensors["b2"], "b2": tensors["b1"]}


class GLoRABranch(Branch):
    """s · (b1 (b2 x) + W (a1 (a2 x)))."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The formula above."""
        held = in_order(dict(self.held.items()))
        beside = pointwise(
            layer, convolved(layer, x, held["b2"].reshape(-1, *weight_shape(layer)[1:]).to(x.dtype)), held["b1"]
        )
        before = product(layer, pointwise(layer, pointwise(layer, x, held["a2"]), held["a1"]))
        return self.scale * (beside + before)


@dataclass(frozen=True)
class GLoRA(Ranked):
    """Settings of new layers: `rank`, `alpha`."""

    name: ClassVar[str] = "glora"
    tensors: ClassVar[Mapping[str, bool]] = {"a1": True, "a2": True, "b1": True, "b2": True}

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`a1`, `b1` Kaiming-uniform, `a2`, `b2` zero."""
        shapes = _shapes(layer, self.rank)
        tensors = {
            key: kaiming(shape, generator) if key.endswith("1") else torch.zeros(shape) for key, shape in shapes.items()
        }
        return LayerAdapter(self.name, tensors, self.stored_alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where both pairs fit, in either order."""
        if any(tensor.dim() < 2 for tensor in adapter.tensors.values()):
            return "a vector among a1, a2, b1 and b2; expected matrices"
        tensors = in_order(adapter.tensors)
        ordered = LayerAdapter(adapter.method, tensors, adapter.alpha)
        return check_shapes(ordered, layer, _shapes(layer, tensors["a1"].shape[1]))

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank."""
        return alpha_over(adapter, in_order(adapter.tensors)["a1"].shape[1])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return GLoRABranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The formula above, float32."""
        a1, a2, b1, b2 = (tensor.float().flatten(1) for _, tensor in sorted(in_order(adapter.tensors).items()))
        base = dequantize(layer)
        before = torch.einsum("oi...,ij->oj...", base, (a1 @ a2).to(base.device))
        return cls.scale(adapter) * ((b1 @ b2).reshape(base.shape).to(base.device) + before)


def _shapes(layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    out, width, *kernel = weight_shape(layer)
    ones = [1] * len(kernel)
    return {
        "a1": (width, rank, *ones),
        "a2": (rank, width, *ones),
        "b1": (out, rank, *ones),
        "b2": (rank, width, *kernel),
    }
