"""How the two factors of a LoRA start, from a weight W (out, in) and the scale s they will have.

    gaussian   down ~ N(0, 1/rank²), up = 0               Hu et al. 2021, arXiv 2106.09685; the variance is PEFT's
    pissa      s · up · down = the rank leading singular parts of W       Meng et al. 2024, arXiv 2404.02948
    olora      up, down = the first columns of Q, rows of R; W = QR       Büyükakyüz 2024, arXiv 2406.01775
    loftq      s · up · down = the leading parts of W - dequantised W     Li et al. 2023, arXiv 2310.08659, T = 1
    eva        down = leading right singular vectors of the inputs, up = 0   Paischer et al. 2024, arXiv 2410.07170

All float32. PiSSA, OLoRA and LoftQ begin away from 0, so what training added is a difference:

    s (up · down - up₀ · down₀) = s [up, -up₀] · [down; down₀]            a plain LoRA of twice the rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, convolved, pointwise
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import kernel_shape

Start = Literal["kaiming", "gaussian", "pissa", "olora"]
Factors = tuple[Tensor, Tensor]  # down (rank, in), up (out, rank)


class StartBranch(Branch):
    """-s · up₀ · down₀, never trained: beside a pair that starts there, a fresh layer changes nothing but rounding."""

    def hold(self, device: torch.device, dtype: torch.dtype, *, trainable: bool) -> Branch:
        """In float32, as what is trained, and frozen."""
        super().hold(device, dtype, trainable=trainable)
        self.held.requires_grad_(False)
        return self

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The formula above."""
        down = self.held["down"].reshape(-1, *kernel_shape(layer)).to(x.dtype)
        return -self.scale * pointwise(layer, convolved(layer, x, down), self.held["up"])


def gaussian(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Normal with standard deviation 1 / rank, `shape` being (rank, …)."""
    return torch.empty(*shape).normal_(std=1 / shape[0], generator=generator)


def pissa(weight: Tensor, rank: int, scale: float) -> Factors:
    """down = √(S/s) Vᵀ and up = U √(S/s) of the `rank` leading parts of W = U S Vᵀ. ConfigError for a scale <= 0."""
    _check(weight, rank, scale)
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def olora(weight: Tensor, rank: int) -> Factors:
    """The first rows of R and columns of Q of W = QR; the scale is not divided out, as in PEFT."""
    _check(weight, rank, 1.0)
    Q, R = torch.linalg.qr(weight.float())
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def loftq(weight: Tensor, quantized: Tensor, rank: int, scale: float) -> Factors:
    """Factors whose product is nearest to the error W - dequantised W that quantising made (one iteration)."""
    return pissa(weight.float() - quantized.float(), rank, scale)


def eva(second_moments: Tensor, rank: int) -> Tensor:
    """`down`: the `rank` leading eigenvectors of Σ x xᵀ (in, in), largest first, with a positive largest number."""
    vectors = torch.linalg.eigh(second_moments.double())[1].flip(1)[:, :rank].t()
    _check(second_moments, rank, 1.0)
    signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return (vectors * signs).float().contiguous()


def difference(adapter: LayerAdapter, start: LayerAdapter) -> LayerAdapter:
    """What training added to a `start` away from 0: a pair of twice the rank with the same scale."""
    down = torch.cat([adapter.tensors["down"], start.tensors["down"].to(adapter.tensors["down"])])
    up = torch.cat([adapter.tensors["up"], -start.tensors["up"].to(adapter.tensors["up"])], dim=1)
    alpha = None if adapter.alpha is None else 2 * adapter.alpha
    return replace(adapter, tensors={"down": down, "up": up}, alpha=alpha)


def first_half(adapter: LayerAdapter) -> LayerAdapter:
    """The trained pair of a `difference`."""
    rank = adapter.tensors["down"].shape[0] // 2
    tensors = {"down": adapter.tensors["down"][:rank], "up": adapter.tensors["up"][:, :rank]}
    return replace(adapter, tensors=tensors, alpha=None if adapter.alpha is None else adapter.alpha / 2)


def _check(weight: Tensor, rank: int, scale: float) -> None:
    if rank > min(weight.shape):
        raise ConfigError(f"rank {rank}: a weight of {tuple(weight.shape)} has {min(weight.shape)} singular parts only")
    if scale <= 0:
        raise ConfigError(f"alpha / rank is {scale:g}; a start from singular values needs it above 0")
