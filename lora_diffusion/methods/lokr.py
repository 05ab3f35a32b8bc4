"""LoKr: ΔW = s · w1 ⊗ w2, a Kronecker product; each factor whole or itself low-rank.

Edalati et al. 2022 (KronA), arXiv 2212.10650; LyCORIS, arXiv 2309.14859. `w1` (a, c) or `w1_a w1_b`; `w2`
(b, d[, kh, kw]), or `w2_a w2_b`, or in Tucker form `t2` between `w2_a` (rank, b) and `w2_b` (rank, d); the weight
is (a·b, c·d[, kh, kw]). The scale is alpha / rank where a factor is low-rank, else 1 whatever alpha says.
Early LyCORIS folded the kernel into the columns, w1 (a, c), w2 (b, d·kh·kw / …): read by the same reshape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import CONVOLUTIONS, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.deltas import DeltaBranch, decomposed
from lora_diffusion.methods.loha import tucker
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_beside, kaiming
from lora_diffusion.quantize import dequantize


def factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """w1 (a, c) and w2 (b, d[, kh, kw]), each multiplied out where it comes in parts."""
    first = tensors["w1"] if "w1" in tensors else tensors["w1_a"] @ tensors["w1_b"]
    if "w2" in tensors:
        return first, tensors["w2"]
    a, b = tensors["w2_a"], tensors["w2_b"]
    if "t2" in tensors:
        return first, tucker(tensors["t2"], a, b)
    return first, (a.flatten(1) @ b.flatten(1)).unflatten(1, b.shape[1:])


def kronecker(first: Tensor, second: Tensor, layer: nn.Module, window: Tensor | None = None) -> Tensor:
    """first ⊗ second in the shape of the layer's weight; with a window, those rows of it."""
    product = torch.kron(first.reshape(*first.shape, *(1,) * (second.dim() - 2)), second.contiguous())
    return _rows(product.reshape(len(product), -1), window, 0).reshape(weight_shape(layer))


def _rows(product: Tensor, window: Tensor | None, axis: int) -> Tensor:
    if window is None:
        return product
    start, stop = (int(row) for row in window.tolist())
    return product.narrow(axis, start, stop - start)


class LoKrBranch(DeltaBranch):
    """Linear layers as two small products, convolutions through ΔW."""

    def delta(self, layer: nn.Module) -> Tensor:
        """s · w1 ⊗ w2."""
        return self.scale * kronecker(*factors(dict(self.held.items())), layer, self._window)

    def delta_product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """s · w1 X w2ᵀ with the row x as the matrix X (c, d)."""
        if isinstance(layer, CONVOLUTIONS):
            return super().delta_product(layer, x)
        first, second = factors(dict(self.held.items()))
        inner = F.linear(x.unflatten(-1, (first.shape[1], -1)), second.flatten(1).to(x.dtype))
        return self.scale * _rows((first.to(x.dtype) @ inner).flatten(-2), self._window, -1)

    @property
    def _window(self) -> Tensor | None:
        return dict(self.held.items()).get("window")


@dataclass(frozen=True)
class LoKr(Ranked):
    """Settings of new LoKr layers.

    `factor` bounds the size of w1 (-1: about the root). w2 is low-rank where `rank` is less than half its
    longer side; `both` makes w1 low-rank as well, `tucker` keeps a kernel apart.
    """

    factor: int = -1
    both: bool = False
    tucker: bool = False

    name: ClassVar[str] = "lokr"
    tensors: ClassVar[Mapping[str, bool]] = dict.fromkeys(
        ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "magnitude", "diff_b", "window"), False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise ConfigError(f"lokr: factor is {self.factor}, expected at least 1, or -1 for about the root")

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """As LyCORIS: all Kaiming-uniform but `w2`, or `w2_b`, which is zero."""
        out, width, *kernel = weight_shape(layer)
        (a, b), (c, d) = factorization(out, self.factor), factorization(width, self.factor)
        shapes: dict[str, tuple[int, ...]] = {"w1": (a, c)}
        if self.both and self.rank < max(a, c) / 2:
            shapes = {"w1_a": (a, self.rank), "w1_b": (self.rank, c)}
        if self.rank >= max(b, d) / 2:
            shapes["w2"] = (b, d, *kernel)
        elif self.tucker and math.prod(kernel) > 1:
            shapes |= {"t2": (self.rank, self.rank, *kernel), "w2_a": (self.rank, b), "w2_b": (self.rank, d)}
        else:
            shapes |= {"w2_a": (b, self.rank), "w2_b": (self.rank, d, *kernel)}
        tensors = {
            key: torch.zeros(shape) if key in ("w2", "w2_b") else kaiming(shape, generator)
            for key, shape in shapes.items()
        }
        return LayerAdapter(self.name, tensors, self.stored_alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where the Kronecker product has the weight's rows and numbers."""
        there, shape = adapter.tensors, weight_shape(layer)
        for key in ("w1", "w2"):
            if key not in there and not {f"{key}_a", f"{key}_b"} <= there.keys():
                return f"neither {key} nor {key}_a and {key}_b; expected one of them"
        try:
            first, second = factors({key: torch.empty(t.shape, device="meta") for key, t in there.items()})
            rows, width = first.shape[0] * second.shape[0], first[0].numel() * second[0].numel()
            if "window" in there:
                start, stop = there["window"].tolist()
                rows = stop - start if 0 <= start < stop <= rows else 0
            numbers = rows * width
        except (RuntimeError, ValueError, IndexError):
            rows, numbers = 0, 0
        if rows == shape[0] and numbers == math.prod(shape):
            return check_beside(adapter, layer)
        found = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in there.items())
        return f"{found}; expected factors of a weight of {shape}"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank where a factor is low-rank, else 1."""
        part = next((adapter.tensors[key] for key in ("w2_b", "w1_b") if key in adapter.tensors), None)
        return 1.0 if part is None else alpha_over(adapter, part.shape[0])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return LoKrBranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """s · w1 ⊗ w2, float32; with a magnitude the decomposed change."""
        first, second = factors({key: tensor.float() for key, tensor in adapter.tensors.items()})
        delta = cls.scale(adapter) * kronecker(first, second, layer, adapter.tensors.get("window"))
        return decomposed(dequantize(layer), delta, adapter.tensors.get("magnitude"))


def factorization(size: int, bound: int = -1) -> tuple[int, int]:
    """(m, n) with m · n = size, m <= n and as near as can be; m at most `bound`, or `bound` itself if it divides."""
    if bound > 0 and size % bound == 0:
        return min(bound, size // bound), max(bound, size // bound)
    largest = math.isqrt(size) if bound < 0 else min(bound, math.isqrt(size))
    m = next(m for m in range(largest, 0, -1) if size % m == 0)
    return m, size // m
