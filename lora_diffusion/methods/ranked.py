"""What methods with a rank share: their two settings, the scale, how they start, and how a misfit is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import is_convolution, is_linear, kernel_shape, out_width, weight_shape


@dataclass(frozen=True)
class Ranked:
    """Settings of a method with a rank: `rank` >= 1, `alpha` (None: the rank, so that the scale is 1).

    `rslora`: the scale is alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732), kept as (alpha · √rank) / rank.
    """

    rank: int = 16
    alpha: float | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if self.rank < 1:
            raise ConfigError(f"{name}: rank is {self.rank}, expected at least 1")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ConfigError(f"{name}: alpha is {self.alpha}, expected a finite number")

    @property
    def stored_alpha(self) -> float:
        """The alpha that new layers carry."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return alpha * math.sqrt(self.rank) if self.rslora else alpha

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Linear layers of any precision and one-group convolutions."""
        return is_linear(layer) or is_convolution(layer)


def on_host(tensor: Tensor) -> Tensor:
    """Float32 on the CPU; zeros for what is taken of weights that are not there, as in a memory plan."""
    return torch.zeros(tensor.shape) if tensor.is_meta else tensor.to("cpu", torch.float32)


def alpha_over(adapter: LayerAdapter, rank: int) -> float:
    """alpha / rank; 1 where there is no alpha. (rsLoRA is kept as alpha · √rank.)"""
    return 1.0 if adapter.alpha is None else adapter.alpha / rank


def kaiming(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Uniform in ±1/√(numbers in a row), which is kaiming_uniform_(a=√5), as in microsoft/LoRA; float32."""
    tensor = torch.empty(*shape)
    bound = 1 / math.sqrt(tensor[0].numel())
    return tensor.uniform_(-bound, bound, generator=generator)


def check_pair(adapter: LayerAdapter, layer: nn.Module) -> str | None:
    """None where `down` and `up` fit the layer (linear pairs also come as 1x1 convolutions, and the reverse)."""
    down, up = adapter.tensors["down"], adapter.tensors["up"]
    rank, row, width = down.shape[0], math.prod(kernel_shape(layer)), out_width(layer)
    if rank and down.numel() == rank * row and up.numel() == rank * width and up.shape[:2] == (width, rank):
        return None
    found = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
    return f"{found}; expected down (r, {row}), up ({width}, r) for a weight of {weight_shape(layer)}"


def check_shapes(adapter: LayerAdapter, layer: nn.Module, expected: Mapping[str, Sequence[int]]) -> str | None:
    """None where every tensor that is there has the numbers expected of it, else the first that has not."""
    for name, shape in expected.items():
        tensor = adapter.tensors.get(name)
        if tensor is not None and (not tensor.numel() or tensor.numel() != math.prod(shape)):
            return f"{name} {tuple(tensor.shape)}; expected {tuple(shape)} for a weight of {weight_shape(layer)}"
    return check_beside(adapter, layer)


def check_beside(adapter: LayerAdapter, layer: nn.Module) -> str | None:
    """None where what may stand beside any factors fits: a magnitude with one number an output, or (1, in, …) one an
    input, and a change of the bias."""
    magnitude, bias, shape = adapter.tensors.get("magnitude"), adapter.tensors.get("diff_b"), weight_shape(layer)
    if bias is not None and bias.numel() != shape[0]:
        return f"diff_b {tuple(bias.shape)}; expected ({shape[0]},) for a weight of {shape}"
    if magnitude is None:
        return None
    expected = shape[0] if magnitude.dim() == 1 else shape[1]
    if magnitude.numel() == expected:
        return None
    return f"magnitude {tuple(magnitude.shape)}; expected ({shape[0]},) or (1, {shape[1]}) for a weight of {shape}"
