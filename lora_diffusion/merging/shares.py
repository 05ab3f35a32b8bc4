"""What each adapter adds to each layer, side by side: what a merge combines.

Low-rank pairs speak for themselves. The other methods' change depends on the layer (a norm of W, a factor on it, the
shape alone), so it is taken of the base model's own layers, dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import Adapter, LayerAdapter, same_layer
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.fitting import fit
from lora_diffusion.gates import ALIASES, resolve_weight
from lora_diffusion.layers import submodule
from lora_diffusion.merging.factors import Factors, factors_of
from lora_diffusion.methods import METHODS, bias_change, is_dense
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.stack import AdapterStack


@dataclass(frozen=True)
class Dense:
    """A layer's change: `weight` in the weight's shape and `bias` (out,) or None, both float64.

    For a normalisation they are the changes of its scale and shift, both (width,).
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def kernel(self) -> tuple[int, ...]:
        """(kh, kw) of a convolution, else ()."""
        return tuple(self.weight.shape[2:])

    def dense(self) -> Tensor:
        """The weight's change, (out, in · kh · kw)."""
        return self.weight.flatten(1)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, r), s (r,) falling, V (r, in · kh · kw), r the smaller side."""
        u, s, v = torch.linalg.svd(self.dense(), full_matrices=False)
        return u, s, v


Change = Factors | Dense
Models = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Share:
    """One adapter on one layer, before anything is computed, and its weight there."""

    where: str
    layer: LayerAdapter
    live: nn.Module | None  # the base's own layer, where there is a base
    weight: float

    def change(self) -> Change:
        """What it adds to the layer, the weight aside, in float64 on the CPU: made anew at each call."""
        if self.live is None or self.layer.method == "lora":
            return factors_of(self.layer, self.where)
        bias = bias_change(self.layer)
        weight = METHODS[self.layer.method].delta(self.layer, self.live).double().cpu()
        return Dense(weight, None if bias is None else bias.double().flatten().cpu())


def models_of(base: Any) -> Models:
    """Denoiser and text encoders of a pipeline or Diffusers folder, dense, in float32 where they are read here."""
    if isinstance(base, str | Path):
        base = load_pipeline(base, precision="fp32", device="cpu").pipe
    return AdapterStack(base).components


def shares_of(
    adapters: Sequence[Adapter], weights: Sequence[Any], models: Models | None
) -> dict[tuple[str, str], list[Share]]:
    """(component, layer) -> its shares, none with weight 0; a name with dots is preferred over a flat one.

    With `models` (component -> model) every layer has the name and must fit the shape it has there. Without them,
    ConfigError for a method that is no low-rank pair. AdapterMismatchError where one layer has two shapes.
    """
    names: dict[tuple[str, str], str] = {}
    found: dict[tuple[str, str], list[Share]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        there = {c: list(of) for c, of in adapter.layers.items()}
        levels = resolve_weight(weight, {c: list[str]() for c in ALIASES.values()} | there, adapter.name)
        for component, name, layer, live in _placed(adapter, models):
            where = f"adapter {adapter.name!r}: {component} {name}"
            number, key = levels.at(component, name), (component, same_layer(name))
            if not isinstance(number, float | int):
                raise ConfigError(f"{where}: weight {number} changes by step, image or place; a file holds one number")
            share, others = Share(where, layer, live, float(number)), found.setdefault(key, [])
            if live is None:  # else both fit the base's layer
                _check_alone(share, others)
            others.append(share)
            names[key] = name if "." in name else names.get(key, name)
    wanted = {key: [share for share in shares if share.weight] for key, shares in found.items()}
    return {(key[0], names[key]): shares for key, shares in wanted.items() if shares}


def _placed(adapter: Adapter, models: Models | None) -> Iterator[tuple[str, str, LayerAdapter, nn.Module | None]]:
    if models is None:
        yield from ((component, name, layer, None) for component, name, layer in adapter)
        return
    found = fit(adapter, models)
    found.check(adapter, models)
    for (component, name), layer in found.layers.items():
        yield component, name, layer, submodule(models[component], name)


def _check_alone(share: Share, others: Sequence[Share]) -> None:
    if share.layer.method in METHODS and not is_dense(share.layer.method):
        raise ConfigError(
            f"{share.where}: method {share.layer.method!r} is not linear: it has no change to compute with"
        )
    if share.layer.method != "lora":
        raise ConfigError(
            f"{share.where}: what its method {share.layer.method!r} changes depends on the base model; "
            "name it (base=, --base)"
        )
    if others and (there := _pair_shape(others[0].layer)) != (here := _pair_shape(share.layer)):
        raise AdapterMismatchError(f"{share.where} is {here}, {there} in another adapter")


def _pair_shape(layer: LayerAdapter) -> tuple[int, int]:
    """(out, in · kh · kw) of a low-rank pair's change."""
    return len(layer.tensors["up"]), layer.tensors["down"][0].numel()
