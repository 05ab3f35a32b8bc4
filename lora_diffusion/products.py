"""The low-rank product ((x downᵀ) · gate) up: with gradients, or added in place to what the frozen layer gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.recomputing import keep, made_again, unseen

_PRODUCTS = (nn.Linear.forward, nn.Conv2d.forward, nn.Conv3d.forward)  # W x + b and nothing else

#: bytes of the weights by image that stand in for one layer's, for the length of its call
MOST = 2**30


class LowRank(torch.autograd.Function):
    """((x downᵀ) · gate) up, the factors cast to x's dtype; added in place to `onto` where given.

    Saves x (or what makes it again, see `recomputing.py`) and x downᵀ · gate, which has `rank` numbers a token; where
    `down` is frozen (LoRA-FA), the latter alone.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, gate: Tensor, onto: Tensor | None
    ) -> Tensor:
        hidden = gated(F.linear(x, down.to(x.dtype)), gate)
        ctx.how, kept = keep(x) if ctx.needs_input_grad[1] else (None, [None])
        ctx.save_for_backward(hidden, down, up, gate, *kept)
        if onto is None:
            return hidden @ up.to(x.dtype)
        ctx.mark_dirty(onto)
        onto.view(-1, onto.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.to(x.dtype))
        return onto

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor, None, Tensor | None]:
        hidden, down, up, gate, *kept = ctx.saved_tensors
        x = made_again(ctx.how, kept)
        rows = grad.flatten(0, -2)
        inner = gated(F.linear(grad, up.to(grad.dtype)), gate)
        grad_up = (hidden.to(grad.dtype).flatten(0, -2).t() @ rows).to(up.dtype)  # they differ under autocast
        grad_down = None if x is None else (inner.flatten(0, -2).t() @ x.to(grad.dtype).flatten(0, -2)).to(down.dtype)
        grad_x = inner @ down.to(inner.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_down, grad_up, None, grad if ctx.needs_input_grad[4] else None


def add_trained(x: Tensor, out: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """`out` and the product of a linear layer's pair, with gradients; in place where nothing stands against it."""
    if torch.compiler.is_compiling():
        return out + LowRank.apply(x, down, up, gate, None).to(out.dtype)
    with unseen():
        own = out.is_contiguous() and not out._is_view() and not (out.is_leaf and out.requires_grad)
        if own and out.dtype == x.dtype:
            return LowRank.apply(x, down, up, gate, out)
        return out + LowRank.apply(x, down, up, gate, None).to(out.dtype)


def pair_norm(down: Tensor, up: Tensor, scale: float = 1.0) -> float:
    """Frobenius norm of scale · upᵀ · down, `down` (rank, …) and `up` (rank, out), without making the product."""
    rows = down.flatten(1)
    square = ((rows @ rows.t()) * (up @ up.t())).sum().item()
    return abs(scale) * math.sqrt(max(0.0, square))


def gated(hidden: Tensor, gate: Tensor) -> Tensor:
    """`hidden` times the gate, which is float32: one rounding."""
    return (hidden * gate).to(hidden.dtype)


def add_linear(x: Tensor, out: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """`out` and the product of a linear layer's pair; in place where nothing stands against it.

    Where a gate by image, (batch, 1, R), is 0 for most rows of every image, each image meets its own rows alone.
    """
    by_image = gate.dim() == 3 == x.dim() and gate.shape[:2] == (len(x), 1)
    by_image = by_image and not torch.compiler.is_compiling()  # how many rows act would be a number of the graph's
    own = _own_rows(down, up, gate) if by_image else None
    if own is not None:
        down, up, gate = own
    hidden = gated(F.linear(x, down) if own is None else x @ down.transpose(1, 2), gate.to(x.device))
    if out.dtype != hidden.dtype or not out.is_contiguous() or out.requires_grad:
        return out + (hidden @ up).to(out.dtype)
    if own is not None:
        return out.baddbmm_(hidden, up)
    out.view(-1, out.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up)
    return out


def merging_pays(layer: nn.Module, x: Tensor, tokens: int, *, weights: int = 1) -> bool:
    """Whether a merged weight can stand in for a layer's own when it meets x, and takes less time than the branch.

    `weights`: as many are made at a time, each to meet `tokens`; not where they would take more than `MOST` bytes.
    """
    weight: Tensor | None = vars(layer)["_parameters"].get("weight")
    if weight is None or type(layer).forward not in _PRODUCTS:
        return False  # what a class of its own makes of its weight is unknown
    if not weight.is_floating_point() or weight.dim() < 2 or weight.is_meta or weight.device != x.device:
        return False  # 4-bit, offloaded or tied up otherwise
    if weight.dtype == torch.float16 and weight.device.type == "cpu":
        return False  # float16 matrix products are slow there
    if weights > 1 and weights * weight.nbytes > MOST:
        return False
    out, width = weight.shape[0], weight[0].numel()
    return tokens * (width + out) > width * out


class WeightByImage(Tensor):
    """Weights (batch, out, in) in the place of one (out, in): `F.linear` gives every image of x (batch, tokens, in)
    its own."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _linear_by_image(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _linear_by_image(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.bmm(input, weight.as_subclass(Tensor).transpose(1, 2))
    return out if bias is None else out.add_(bias)


def merged_by_image(weight: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> WeightByImage:
    """weight + upᵀ diag(gate) down for every image, gate (batch, 1, R): rounded once, in the weight's dtype."""
    own = _own_rows(down, up, gate)
    down, up, gate = (down, up, gate) if own is None else own
    columns = (up.mT * gate.to(up.device)).to(weight.dtype)
    rows = down.to(weight.dtype).expand(len(gate), *down.shape[-2:])
    return torch.baddbmm(weight.expand(len(gate), *weight.shape), columns, rows).as_subclass(WeightByImage)


def _own_rows(down: Tensor, up: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The rows that act on each image alone, (batch, k, …), with their gate; None where most rows do."""
    if (own := _acting(gate[:, 0])) is None:
        return None
    here = own.to(down.device)
    return down[here], up[here], gate.gather(2, own[:, None])


def _acting(gate: Tensor) -> Tensor | None:
    """Indices of the rows that act on each image, (batch, k); None where that is more than half of them."""
    acts = gate != 0  # (batch, R)
    most = int(acts.sum(1).max())
    if len(acts) < 2 or 2 * most > acts.shape[1]:
        return None
    return (~acts).int().argsort(dim=1, stable=True)[:, :most]


def add_convolution(x: Tensor, out: Tensor, down: Tensor, up: Tensor, gate: Tensor, how: dict[str, Any]) -> Tensor:
    """The same for a convolution, `how` it goes over the picture or video."""
    hidden = convolve(x, down.to(x), how)  # (batch, R[, frames], height, width)
    columns = over_pixels(gate.to(x.device)[None, None] if gate.dim() == 1 else gate.to(x.device), hidden)
    return out + convolve(gated(hidden, columns), over_places(up.to(x).t(), hidden)).to(out.dtype)


def convolve(x: Tensor, weight: Tensor, how: dict[str, Any] | None = None) -> Tensor:
    """`x` (batch, in[, frames], height, width) times a weight with as many axes, `how` as for `F.conv2d`."""
    return (F.conv3d if weight.dim() == 5 else F.conv2d)(x, weight, **(how or {}))


def over_places(matrix: Tensor, image: Tensor) -> Tensor:
    """`matrix` (a, b) with an axis of length 1 for each that `image` has behind its channels."""
    return matrix[(..., *(None,) * (image.dim() - 2))]


def over_pixels(gate: Tensor, image: Tensor) -> Tensor:
    """A gate by place, (batch or 1, 1 or places, R), as it multiplies an image or a video of R channels."""
    columns = gate.transpose(1, 2)  # (batch or 1, R, 1 or all places)
    return over_places(columns[..., 0], image) if columns.shape[2] == 1 else columns.unflatten(2, image.shape[2:])
