"""SEAM 1: adapter methods. One file a method: its tensors, how it starts, what it adds.

A method is a class: its instances are the settings of new layers (`LoRA(rank=16, alpha=8)`), its static
parts read what any file holds. It is pure mathematics on a frozen layer and knows no key spelling and
no pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.lora import Pair
from lora_diffusion.registry import Registry


class Method(Protocol):
    """One way to adapt a layer."""

    name: ClassVar[str]
    tensors: ClassVar[Mapping[str, bool]]  # tensor name -> required

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Whether this method is defined on that kind of layer."""
        ...

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """New float32 tensors for `layer` that change nothing yet; random where the paper says so."""
        ...

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None if `adapter` fits `layer`, else what does not: "found …; expected …"."""
        ...

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """The factor on the delta at weight 1 (for low-rank methods alpha / rank)."""
        ...

    @classmethod
    def pair(cls, name: str, adapter: LayerAdapter) -> Pair:
        """The low-rank pair to pack into a slot under an adapter's name."""
        ...

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The dense change of `layer`'s weight at weight 1, float32, in the weight's shape."""
        ...


METHODS: Registry[type[Method]] = Registry("methods", {"lora": "lora_diffusion.methods.lora:LoRA"})
