"""A frozen linear layer with 8-bit weights: one signed byte a weight, one scale a row.

    y = x · (q ⊙ s)ᵀ + b        q = round(W / s),  s = max|row of W| / 127

Weight-only: activations stay as they are, forward and backward run on any device in the activation's dtype,
and training keeps nothing but the bytes that are there anyway. bitsandbytes' `Linear8bitLt` (0.50) stores the
same bytes, but rounds activations to 8 bits as well, on a CPU gives other numbers in `eval` than in `train`,
and keeps its input alive for the backward pass of a frozen weight; that is why this layer stands in for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Int8Linear", "bias_of"]


class Int8Linear(nn.Linear):
    """`nn.Linear` over int8 rows. `weight` (out, in) int8 and frozen; `scale` (out, 1) float32."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias, device="meta")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.int8, device="meta"), requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.empty(outputs, 1, device="meta"))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear, *, device: torch.device, dtype: torch.dtype) -> Int8Linear:
        """`layer` rounded to 8 bits on `device`, its bias in `dtype`. A row of zeros stays zeros."""
        bias = bias_of(layer)
        ours = cls(layer.in_features, layer.out_features, bias=bias is not None)
        weight = layer.weight.detach().to(device=device, dtype=torch.float32, copy=True)
        scale = weight.abs().amax(dim=1, keepdim=True).div_(127)
        codes = weight.div_(scale.clamp_min(torch.finfo(torch.float32).tiny))
        ours.weight = nn.Parameter(codes.round_().clamp_(-127, 127).to(torch.int8), requires_grad=False)
        ours.scale = scale
        if bias is not None:
            ours.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype), requires_grad=False)
        return ours.train(layer.training)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers of `dtype`, rounded once."""
        return _dense(self.weight, self.scale, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in) -> (..., out), computed in the dtype of `input`."""
        bias = bias_of(self)
        bias = None if bias is None else bias.to(input.dtype)
        if torch.is_grad_enabled() and input.requires_grad:
            return _Product.apply(input, self.weight, self.scale, bias)  # type: ignore[no-any-return]
        return F.linear(input, self.dense(input.dtype), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # `.half()` and `.to(dtype)` move the layer, and leave its numbers alone
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"


class _Product(torch.autograd.Function):
    """The product with a frozen weight: the backward pass rebuilds it from the bytes and saves no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dense(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return grads[0] @ _dense(weight, scale, grads[0].dtype), None, None, None


def bias_of(layer: nn.Linear) -> Tensor | None:
    """The layer's bias, or None (torch declares it as always there)."""
    return layer.bias


@torch.no_grad()
def _dense(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(weight, scale, out=out)
