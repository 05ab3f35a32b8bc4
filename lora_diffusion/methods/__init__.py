"""SEAM 1: adapter methods. One file a method: its tensors, how it starts, what it adds.

A method is pure mathematics on a frozen layer; it knows no key spelling and no pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from lora_diffusion.registry import Registry

if TYPE_CHECKING:
    from lora_diffusion.adapter import LayerAdapter


class Branch(nn.Module):
    """What one method adds to one layer, as a module that sits in the layer's slot.

    `weight` is the user's number (any finite float); the branch multiplies its own scale in.
    """

    def forward(self, x: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """`out`, the frozen layer's output for input `x`, with this branch added at `weight`."""
        raise NotImplementedError


class Method(Protocol):
    """One way to adapt a layer."""

    name: str
    tensors: Mapping[str, bool]  # tensor name -> required

    def supports(self, layer: nn.Module) -> bool:
        """Whether this method is defined on that kind of layer."""
        ...

    def fresh(self, layer: nn.Module, rank: int, alpha: float) -> LayerAdapter:
        """New float32 tensors for `layer` that change nothing yet; random where the paper says so."""
        ...

    def check(self, adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None if `adapter` fits `layer`, else what does not: `"found … – expected …"`."""
        ...

    def scale(self, adapter: LayerAdapter) -> float:
        """The factor on the delta at weight 1 (for low-rank methods alpha / rank)."""
        ...

    def delta(self, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The dense change of `layer`'s weight at weight 1, float32, in the weight's shape."""
        ...


METHODS: Registry[Method] = Registry("methods", {"lora": "lora_diffusion.methods.lora:LORA"})
