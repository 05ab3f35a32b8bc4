"""FourierFT: a weight's change from a few of its Fourier coefficients, ΔW = alpha · Re ifft2(F).

Gao et al. 2024, arXiv 2405.03003. F (out, in) is zero but at n places, drawn from a seed as PEFT draws them;
`spectrum` (n,) has the numbers there, `grid` three whole numbers: the seed and the sides of F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import is_linear, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.deltas import DeltaBranch


@lru_cache(maxsize=16)
def places(seed: int, out: int, width: int, count: int) -> Tensor:
    """Where the coefficients are in F laid out flat: (count,) whole numbers, no two the same."""
    return torch.randperm(out * width, generator=torch.Generator().manual_seed(seed))[:count]


def change(spectrum: Tensor, grid: Tensor, alpha: float) -> Tensor:
    """ΔW (out, in) as the formula says, float32."""
    seed, out, width = (int(number) for number in grid)
    where = places(seed, out, width, len(spectrum)).to(spectrum.device)
    dense = torch.zeros(out * width, device=spectrum.device).index_put((where,), spectrum.float())
    return torch.fft.ifft2(dense.view(out, width)).real * alpha


class FourierFTBranch(DeltaBranch):
    """The change, made again for each call: n numbers are kept, not out · in."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__(name, tensors, scale)
        self.grid = tensors["grid"].cpu()  # read for every call: not on the GPU

    def delta(self, layer: nn.Module) -> Tensor:
        """ΔW."""
        return change(self.held["spectrum"], self.grid, self.scale)


@dataclass(frozen=True)
class FourierFT:
    """Settings of new layers: how many coefficients (at most out · in), the scale `alpha`, and the places' seed."""

    frequencies: int = 1000
    alpha: float = 150.0
    seed: int = 777

    name: ClassVar[str] = "fourierft"
    tensors: ClassVar[Mapping[str, bool]] = {"spectrum": True, "grid": True}

    def __post_init__(self) -> None:
        if self.frequencies < 1 or self.seed < 0:
            raise ConfigError(f"fourierft: {self.frequencies} frequencies, seed {self.seed}; expected >= 1 and >= 0")

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Linear layers of any precision."""
        return is_linear(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """Zeros."""
        out, width = weight_shape(layer)
        spectrum = torch.zeros(min(self.frequencies, out * width))
        grid = torch.tensor([self.seed, out, width])
        return LayerAdapter(self.name, {"spectrum": spectrum, "grid": grid}, self.alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where the grid has the weight's sides and room for the spectrum."""
        spectrum, grid, (out, width) = adapter.tensors["spectrum"], adapter.tensors["grid"], weight_shape(layer)
        fits = spectrum.dim() == 1 and 0 < len(spectrum) <= out * width
        if fits and grid.numel() == 3 and grid.tolist() == [max(0, int(grid[0])), out, width]:
            return None
        return f"spectrum {tuple(spectrum.shape)}, grid {grid.tolist()}; expected (n,) and [seed, {out}, {width}]"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha, 1 where there is none."""
        return 1.0 if adapter.alpha is None else adapter.alpha

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return FourierFTBranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """ΔW, float32."""
        return change(adapter.tensors["spectrum"], adapter.tensors["grid"], cls.scale(adapter))
