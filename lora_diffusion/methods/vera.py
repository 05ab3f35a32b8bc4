"""VeRA: ΔW = diag(b) B diag(d) A, where A and B are random, frozen and shared by all layers; b and d are trained.

Kopiczko et al. 2023, arXiv 2310.11454. `d` (rank,), `b` (out,), and `projection`, three whole numbers from which A and
B are made again: the seed, and the outputs and inputs of the widest layer (`projections.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import is_linear, out_width, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.projections import Projections, fault_of, projections, read


class VeRABranch(Branch):
    """b · B (d · A x). A is frozen, so the backward pass keeps `rank` numbers a token and not `in`."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(name, tensors)
        self.stored = read(tensors["projection"])
        self.shared: Projections | None = None

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The formula above; A and B follow the input's device and precision."""
        shared, (height, width) = self.shared, weight_shape(layer)
        if shared is None or (shared.A.device, shared.A.dtype) != (x.device, x.dtype):
            shared = self.shared = projections(self.stored, self.held["d"].numel(), x.device, x.dtype)
        hidden = F.linear(x, shared.A[:, :width]) * self.held["d"].to(x.dtype)
        return F.linear(hidden, shared.B[:height]) * self.held["b"].to(x.dtype)


@dataclass(frozen=True)
class VeRA:
    """Settings of new layers: `rank`, far above LoRA's; the `seed` of A and B; what `d` begins as; `b` begins at 0.

    `sides` are (out, in) of the widest layer, which `attach` finds among its targets; None: the layer's own.
    """

    rank: int = 256
    seed: int = 0
    start: float = 0.1
    sides: tuple[int, int] | None = None

    name: ClassVar[str] = "vera"
    tensors: ClassVar[Mapping[str, bool]] = {"d": True, "b": True, "projection": True}

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"vera: rank {self.rank} and seed {self.seed}; expected at least 1 and at least 0")
        if not math.isfinite(self.start) or not self.start:
            raise ConfigError(f"vera: start is {self.start}; expected a number, and not 0, from which nothing moves")

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Linear layers of any precision, as in the paper."""
        return is_linear(layer)

    def spanning(self, layers: Iterable[nn.Module]) -> VeRA:
        """These settings with the sides of the widest of `layers`."""
        shapes = [weight_shape(layer) for layer in layers]
        return replace(self, sides=(max(out for out, _ in shapes), max(width for _, width in shapes)))

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`d` as `start` says and `b` zero."""
        d, b = torch.full((self.rank,), self.start), torch.zeros(out_width(layer))
        projection = torch.tensor([self.seed, *(self.sides or weight_shape(layer))])
        return LayerAdapter(self.name, {"d": d, "b": b, "projection": projection})

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where `b` has the layer's outputs and the projections reach over it."""
        d, b, shape = adapter.tensors["d"], adapter.tensors["b"], weight_shape(layer)
        if d.dim() != 1 or not d.numel() or b.shape != shape[:1]:
            return f"d {tuple(d.shape)}, b {tuple(b.shape)}; expected (r,) and ({shape[0]},) for a weight of {shape}"
        return fault_of(adapter.tensors["projection"], shape)

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """1."""
        return 1.0

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return VeRABranch(name, adapter.tensors)

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The formula above, float32."""
        d, b, stored = (adapter.tensors[key] for key in ("d", "b", "projection"))
        shared, (out, width) = projections(read(stored), d.numel(), d.device), weight_shape(layer)
        return (b.float()[:, None] * shared.B[:out]) @ (d.float()[:, None] * shared.A[:, :width])
