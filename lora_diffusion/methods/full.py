"""Full: ΔW itself, and the change of the bias. Native fine-tuning as a file of differences.

`diff` in the shape of the weight, `diff_b` (out,); either may be missing. The strength multiplies both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, by_channel, convolved
from lora_diffusion.layers import is_convolution, is_linear, out_width, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.ranked import check_shapes


class FullBranch(Branch):
    """ΔW x + Δb."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The formula above; Δb alone is spread over the output."""
        change = torch.zeros_like(out)
        if "diff" in self.held:
            change = convolved(layer, x, self.held["diff"].reshape(weight_shape(layer)).to(x.dtype))
        if "diff_b" in self.held:
            change = change + by_channel(layer, self.held["diff_b"]).to(out.dtype)
        return change


@dataclass(frozen=True)
class Full:
    """Settings of new layers: whether the bias of a layer that has one is trained too."""

    bias: bool = False

    name: ClassVar[str] = "full"
    tensors: ClassVar[Mapping[str, bool]] = {"diff": False, "diff_b": False}

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Linear layers of any precision and one-group convolutions."""
        return is_linear(layer) or is_convolution(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """Zeros."""
        tensors = {"diff": torch.zeros(weight_shape(layer))}
        if self.bias and isinstance(getattr(layer, "bias", None), Tensor):
            tensors["diff_b"] = torch.zeros(out_width(layer))
        return LayerAdapter(self.name, tensors)

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where each has its layer's shape and there is one."""
        if not adapter.tensors:
            return "no tensor; expected diff or diff_b"
        return check_shapes(adapter, layer, {"diff": weight_shape(layer), "diff_b": (out_width(layer),)})

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """1."""
        return 1.0

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return FullBranch(name, adapter.tensors)

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """`diff`, float32; zeros where only the bias changes."""
        diff = adapter.tensors.get("diff")
        return torch.zeros(weight_shape(layer)) if diff is None else diff.float().reshape(weight_shape(layer))
