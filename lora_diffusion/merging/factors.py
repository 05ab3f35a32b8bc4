"""Low-rank factors and dense deltas: the linear algebra every merge stands on, in float64 on small matrices.

A delta is up · down with up (out, r) and down (r, in · kh · kw). Its singular values come from two QR
decompositions and one r x r SVD; the dense product is never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.products import pair_norm


@dataclass(frozen=True)
class Factors:
    """`up` (out, r) with the scale inside, `down` (r, in · kh · kw), and the kernel (kh, kw) or ()."""

    up: Tensor
    down: Tensor
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]

    def scaled(self, weight: float) -> Factors:
        """Times a number."""
        return Factors(self.up * weight, self.down, self.kernel)

    def dense(self) -> Tensor:
        """up · down, (out, in · kh · kw)."""
        return self.up @ self.down

    def dot(self, other: Factors) -> float:
        """The inner product of two deltas, without making them."""
        inside = (self.up.double().t() @ other.up.double()) * (self.down.double() @ other.down.double().t())
        return float(inside.sum())

    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return pair_norm(self.down.double(), self.up.double().t())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, r), s (r,) falling, V (r, in · kh · kw), in float64."""
        left, inner = torch.linalg.qr(self.up.double())
        right, outer = torch.linalg.qr(self.down.double().t())
        u, s, v = torch.linalg.svd(inner @ outer.t(), full_matrices=False)
        return left @ u, s, v @ right.t()

    def layer(self) -> LayerAdapter:
        """The `lora` layer that says the same: float32, alpha = rank, so that its scale is 1."""
        down = self.down.float().reshape(self.rank, -1, *self.kernel)
        up = self.up.float().reshape(-1, self.rank, *(1 for _ in self.kernel))
        return LayerAdapter("lora", {"down": down.contiguous(), "up": up.contiguous()}, float(self.rank), "tensor")


def factors_of(layer: LayerAdapter, where: str) -> Factors:
    """A layer's factors in float64. ConfigError for a method that is no low-rank pair."""
    if layer.method != "lora":
        raise ConfigError(f"{where}: its method is {layer.method!r}; merging works on 'lora' pairs")
    pair = LoRA.pair("", layer)
    up = pair.up.double().reshape(-1, pair.rank) * pair.scale
    return Factors(up, pair.down.double().flatten(1), tuple(pair.down.shape[2:]))


def concatenated(parts: list[Factors]) -> Factors:
    """The exact sum of deltas: ranks add up."""
    return Factors(torch.cat([p.up for p in parts], 1), torch.cat([p.down for p in parts]), parts[0].kernel)


def truncated(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of at most `rank` (Eckart and Young 1936), the energy it keeps, and the whole energy."""
    u, s, v = factors.svd()
    return from_svd(u, s, v, rank, factors.kernel)


def factored(delta: Tensor, rank: int, kernel: tuple[int, ...]) -> tuple[Factors, float, float]:
    """The same for a dense delta (out, in · kh · kw)."""
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return from_svd(u, s, v, rank, kernel)


def from_svd(u: Tensor, s: Tensor, v: Tensor, rank: int, kernel: tuple[int, ...]) -> tuple[Factors, float, float]:
    """The first `rank` (at least 1) singular triples as balanced factors, their energy and the whole."""
    rank = max(1, min(rank, len(s)))
    root = s[:rank].sqrt()
    energy = s.square()
    return (
        Factors(u[:, :rank] * root, root[:, None] * v[:rank], kernel),
        float(energy[:rank].sum()),
        float(energy.sum()),
    )
