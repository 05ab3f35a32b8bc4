"""SEAM 1: adapter methods. One file a method: its tensors, how it starts, what it adds.

A method is a class: its instances are the settings of new layers (`LoRA(rank=16, alpha=8)`), its static
parts read what any file holds. It is pure mathematics on a frozen layer and knows no key spelling and
no pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError, some
from lora_diffusion.lora import Part
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
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """What goes into the layer's slot under an adapter's name: a low-rank pair or a branch. Copies nothing."""
        ...

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The dense change of `layer`'s weight at weight 1, float32, in the weight's shape. May depend on W."""
        ...


METHODS: Registry[type[Method]] = Registry(
    "methods",
    {
        "lora": "lora_diffusion.methods.lora:LoRA",
        "biased": "lora_diffusion.methods.biased:Biased",
        "dora": "lora_diffusion.methods.dora:DoRA",
        "locon": "lora_diffusion.methods.locon:LoCon",
        "loha": "lora_diffusion.methods.loha:LoHa",
        "lokr": "lora_diffusion.methods.lokr:LoKr",
        "ia3": "lora_diffusion.methods.ia3:IA3",
        "vera": "lora_diffusion.methods.vera:VeRA",
        "glora": "lora_diffusion.methods.glora:GLoRA",
        "oft": "lora_diffusion.methods.oft:OFT",
        "full": "lora_diffusion.methods.full:Full",
        "norm": "lora_diffusion.methods.norm:Norm",
    },
)


def bias_change(adapter: LayerAdapter) -> Tensor | None:
    """What a layer's share adds to the bias at weight 1: `diff_b`, `b_norm`, and a pair's `up_bias` times its scale."""
    found = next((adapter.tensors[key] for key in ("diff_b", "b_norm") if key in adapter.tensors), None)
    if "up_bias" not in adapter.tensors:
        return found
    scaled = adapter.tensors["up_bias"].float() * METHODS[adapter.method].scale(adapter)
    return scaled if found is None else found.float() + scaled


def new_method(name: str, **settings: object) -> Method:
    """The method `name` with those of the settings that it has: (IA)³ has no rank.

    ConfigError for one that is switched on (True, or a word) and that the method does not know, such as `rslora` for
    OFT. None and False leave the method's own default.
    """
    method = METHODS[name]
    known = {field.name for field in fields(cast("Any", method))}
    settings = {key: value for key, value in settings.items() if value is not None and value is not False}
    if senseless := [key for key, value in settings.items() if isinstance(value, bool | str) and key not in known]:
        raise ConfigError(
            f"method {name!r} has no setting {some(senseless)}; it has {some(sorted(known), 9) or 'none'}"
        )
    return method(**{key: value for key, value in settings.items() if key in known})
