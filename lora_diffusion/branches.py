"""Branches: what adapters that are no low-rank pair add to a frozen layer's output.

    y = base + weight · (adapted - base)          base = W x + b, adapted = the layer with the adapter at weight 1

So every method is linear in its weight and stacks by addition; at weight 1 it is what its paper says, at 0 the
base. (LyCORIS and PEFT put a DoRA's multiplier inside the norm; all agree at 1.) What a branch computes depends
on `x`, on the base output and on the frozen weight W alone, never on other adapters: stacking commutes. W is
reached as the layer's own product, so that nothing dense is rebuilt over 4 bits:

    product(layer, x) = W x      the layer's forward without its hooks, less its bias
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.layers import CONVOLUTIONS, convolution_arguments, kernel_shape
from lora_diffusion.products import convolve, over_places


class Branch(nn.Module):
    """One adapter's tensors on one layer, named as its method names them, and what they add to the output."""

    kept: Tensor | None

    def __init__(self, name: str, tensors: Mapping[str, Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.name, self.scale = name, scale
        self.held = nn.ParameterDict({key: nn.Parameter(t, requires_grad=False) for key, t in tensors.items()})
        self.register_buffer("kept", None, persistent=False)

    def hold(self, device: torch.device, dtype: torch.dtype, *, trainable: bool) -> Branch:
        """Contiguous copies of the tensors: matrices in `dtype`, vectors and what is trained in float32."""
        for key, tensor in self.held.items():
            floating = tensor.is_floating_point()
            kind = tensor.dtype if not floating else torch.float32 if trainable or tensor.dim() < 2 else dtype
            copy = tensor.detach().to(device, kind, copy=True, memory_format=torch.contiguous_format)
            self.held[key] = nn.Parameter(copy, requires_grad=trainable and floating)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Branch:
        """Moved or cast: vectors stay float32, as `hold` has them, and what was made of the tensors is made anew."""
        self.kept = None
        exact = {key: held.data for key, held in self.held.items() if held.dtype == torch.float32 and held.dim() < 2}
        super()._apply(fn, recurse)
        for key, vector in exact.items():
            if (held := self.held[key]).dtype != vector.dtype:
                held.data = vector.to(held.device)
        return self

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """adapted - base at weight 1, in the shape of `out`, which is the frozen layer's output for `x`."""
        raise NotImplementedError(type(self).__name__)

    def constant(self, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, without gradient and only once where nothing is being trained."""
        if any(parameter.requires_grad for parameter in self.held.values()):
            return make()
        if self.kept is None:
            with torch.no_grad():
                self.kept = make()
        return self.kept


def add_branches(turned: Iterable[tuple[Branch, Tensor]], layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """`out` with every branch times its number, which is float32 and so is their sum. Leaves `out` as it is."""
    total: Tensor | None = None
    for branch, number in turned:
        share = branch.change(layer, x, out) * number
        total = share if total is None else total + share
    return out if total is None else out + total.to(out.dtype)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with, as its hooks are told."""
    return args[0] if args else next(iter(kwargs.values()))


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """W x in the layer's own precision, without its bias and without any hook."""
    return without_bias(layer, layer.forward(x))


def without_bias(layer: nn.Module, out: Tensor) -> Tensor:
    """The layer's output less its bias: W x."""
    bias = getattr(layer, "bias", None)
    return out - by_channel(layer, bias.to(out.dtype)) if isinstance(bias, Tensor) else out


def by_channel(layer: nn.Module, vector: Tensor) -> Tensor:
    """A number for each channel, shaped to multiply the layer's input or output."""
    axes = kernel_shape(layer)[1:] if isinstance(layer, CONVOLUTIONS) else ()
    return vector.reshape(-1, *(1 for _ in axes))


def convolved(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """`x` times a weight in the frozen weight's place: stride, padding and dilation are the layer's."""
    how = convolution_arguments(layer)
    return F.linear(x, weight) if how is None else convolve(x, weight, how)


def pointwise(layer: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
    """`matrix` (a, b) times the channels of `x`, at every place."""
    matrix = matrix.flatten(1).to(x.dtype)
    return convolve(x, over_places(matrix, x)) if isinstance(layer, CONVOLUTIONS) else F.linear(x, matrix)
