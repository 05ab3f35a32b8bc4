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
        "adalora": "lora_diffusion.methods.adalora:AdaLoRA",
        "tlora": "lora_diffusion.methods.tlora:TLoRA",
        "locon": "lora_diffusion.methods.locon:LoCon",
        "loha": "lora_diffusion.methods.loha:LoHa",
        "lokr": "lora_diffusion.methods.lokr:LoKr",
        "ia3": "lora_diffusion.methods.ia3:IA3",
        "vera": "lora_diffusion.methods.vera:VeRA",
        "glora": "lora_diffusion.methods.glora:GLoRA",
        "oft": "lora_diffusion.methods.oft:OFT",
        "full": "lora_diffusion.methods.full:Full",
        "norm": "lora_diffusion.methods.norm:Norm",
        "set": "lora_diffusion.methods.replaced:Set",
        "bottleneck": "lora_diffusion.methods.bottleneck:Bottleneck",
        "prefix": "lora_diffusion.methods.prefix:Prefix",
    },
)


class Course(Protocol):
    """What a method does beside the optimiser while it is trained, such as giving out ranks.

    A method has one by defining `course(layers, steps)`, `layers` being the trained tensors of each layer by their
    names. (A method may also define `spanning(layers)`, `frozen`, `fading` and its branches a `fade(fading, noise)`,
    `dense` and, for tensors that files hold in another form, `written(adapter, whole=…)` and its reverse
    `resumed(written, fresh)`: see VeRA, LoRA, T-LoRA, the bottleneck and AdaLoRA.)
    """

    def penalty(self) -> Tensor:
        """What is added to the loss of a step."""
        ...

    def after(self, step: int) -> None:
        """Called after optimiser step 1, 2, …, while its gradients are there."""
        ...

    def enforce(self) -> None:
        """Called when the parameters were written from outside: hold them to what was decided."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint needs, each name beginning with "course/"."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's tensors, which may have others beside."""
        ...


def written(layers: Mapping[str, LayerAdapter]) -> dict[str, LayerAdapter]:
    """Trained layers as files hold them; one of which nothing is left is left out, unless that is so of all."""
    found: dict[str, LayerAdapter | None] = {name: _written(layer, whole=False) for name, layer in layers.items()}
    if not any(found.values()):
        found = {name: _written(layer, whole=True) for name, layer in layers.items()}
    return {name: layer for name, layer in found.items() if layer is not None}


def _written(layer: LayerAdapter, *, whole: bool) -> LayerAdapter | None:
    own = getattr(METHODS[layer.method], "written", None)
    return layer if own is None else own(layer, whole=whole)


def resumed(layers: Mapping[str, LayerAdapter], fresh: Mapping[str, LayerAdapter]) -> dict[str, LayerAdapter]:
    """The reverse of `written`, for slots that were made of `fresh`."""
    own = {name: getattr(METHODS[new.method], "resumed", None) for name, new in fresh.items()}
    return {**layers, **{name: back(layers.get(name), fresh[name]) for name, back in own.items() if back is not None}}


def outline(layer: LayerAdapter) -> LayerAdapter:
    """Method, alpha and shapes of a fresh layer; its numbers too where `resumed` or the method's settings need them."""
    return layer if hasattr(METHODS[layer.method], "resumed") else layer.cast(torch.device("meta"))


def is_dense(name: str) -> bool:
    """Whether a method's adapters say a change of the weight, so that they can be merged; most do."""
    return getattr(METHODS[name], "dense", True)


def bias_change(adapter: LayerAdapter) -> Tensor | None:
    """What a layer's share adds to the bias at weight 1: `diff_b`, `b_norm`, and a pair's `up_bias` times its scale."""
    found = next((adapter.tensors[key] for key in ("diff_b", "b_norm") if key in adapter.tensors), None)
    if adapter.method != "biased" or "up_bias" not in adapter.tensors:
        return found
    scaled = adapter.tensors["up_bias"].float() * METHODS[adapter.method].scale(adapter)
    return scaled if found is None else found.float() + scaled


def new_method(name: str, own: Mapping[str, object] | None = None, /, **settings: object) -> Method:
    """The method `name` with those of the settings that it has: (IA)³ has no rank.

    ConfigError for one that is switched on (True, or a word) and that the method does not know, such as `rslora` for
    OFT, and for any of `own` that it does not know. None and False leave the method's own default.
    """
    method, own = METHODS[name], own or {}
    known = {field.name for field in fields(cast("Any", method))}
    settings = {key: value for key, value in settings.items() if value is not None and value is not False}
    foreign = {key: value for key, value in settings.items() if isinstance(value, bool | str)} | dict(own)
    if senseless := [key for key in foreign if key not in known]:
        raise ConfigError(
            f"method {name!r} has no setting {some(senseless)}; it has {some(sorted(known), 9) or 'none'}"
        )
    chosen = {key: value for key, value in (settings | dict(own)).items() if key in known}
    return _checked(method, chosen) if own else method(**chosen)


def _checked(method: type[Method], settings: dict[str, object]) -> Method:
    """The method, each setting held to its declared type, as what comes from a file has to be."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(method).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(own := first.get("ctx", {}).get("error"), ConfigError):
            raise own from None  # the method's own words
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"method {method.name!r}: {where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
