"""What each adapter adds to each layer, side by side: what a merge combines.

Low-rank pairs speak for themselves. The other methods' change depends on the layer (a norm of W, a factor on it, the
shape alone), so it is taken of the base model's own layers, dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_diffusion.adapter import Adapter, LayerAdapter, same_layer
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.fitting import fit
from lora_diffusion.gates import resolve_weight
from lora_diffusion.merging.factors import Factors, factors_of
from lora_diffusion.methods import METHODS, bias_change
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.stack import AdapterStack


@dataclass(frozen=True)
class Dense:
    """A layer's change: `weight` in the weight's shape and `bias` (out,) or None, both float64.

    For a normalisation they are the changes of its scale and shift, both (width,).
    """

    weight: Tensor
    bias: Tensor | None = None


Change = Factors | Dense
Share = tuple[Change, float]  # a layer's change by one adapter, and its weight there
Models = Mapping[str, nn.Module]


def models_of(base: Any) -> Models:
    """Denoiser and text encoders of a pipeline or Diffusers folder, dense, in float32 where they are read here."""
    if isinstance(base, str | Path):
        base = load_pipeline(base, precision="fp32", device="cpu").pipe
    return AdapterStack(base).components


def shares_of(
    adapters: Sequence[Adapter], weights: Sequence[Any], models: Models | None
) -> dict[tuple[str, str], list[Share]]:
    """(component, layer) -> its change and weight in the adapters that change it; one with dots names the layer.

    With `models` (component -> model) every layer has the name and must fit the shape it has there. Without them,
    ConfigError for a method that is no low-rank pair. AdapterMismatchError where one layer has two shapes.
    """
    names: dict[tuple[str, str], str] = {}
    found: dict[tuple[str, str], list[Share]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        levels = resolve_weight(weight, {c: list(of) for c, of in adapter.layers.items()}, adapter.name)
        for component, name, layer, live in _placed(adapter, models):
            where = f"adapter {adapter.name!r}: {component} {name}"
            number, key = levels.at(component, name), (component, same_layer(name))
            if not isinstance(number, float | int):
                raise ConfigError(
                    f"{where}: weight {number!r} changes by step, image or place; a file holds one number"
                )
            change = _change(layer, live, where)
            others = found.setdefault(key, [])
            if others and shape_of(others[0][0]) != shape_of(change):
                raise AdapterMismatchError(
                    f"{where} is {shape_of(change)}, {shape_of(others[0][0])} in another adapter"
                )
            others.append((change, float(number)))
            names[key] = name if "." in name else names.get(key, name)
    return {(key[0], names[key]): parts for key, parts in found.items() if any(weight for _, weight in parts)}


def shape_of(change: Change) -> tuple[int, ...]:
    """(out, in · kh · kw), or (width,) of a normalisation."""
    if isinstance(change, Factors):
        return (change.up.shape[0], change.down.shape[1])
    return tuple(change.weight.flatten(1).shape) if change.weight.dim() > 1 else tuple(change.weight.shape)


def _placed(adapter: Adapter, models: Models | None) -> Iterator[tuple[str, str, LayerAdapter, nn.Module | None]]:
    if models is None:
        yield from ((component, name, layer, None) for component, name, layer in adapter)
        return
    found = fit(adapter, models)
    found.check(adapter, models)
    for (component, name), layer in found.layers.items():
        yield component, name, layer, models[component].get_submodule(name)


def _change(layer: LayerAdapter, live: nn.Module | None, where: str) -> Change:
    if layer.method == "lora":
        return factors_of(layer, where)
    if live is None:
        raise ConfigError(
            f"{where}: what its method {layer.method!r} changes depends on the base model; name it (base=, --base)"
        )
    bias = bias_change(layer)
    weight = METHODS[layer.method].delta(layer, live).double().cpu()
    return Dense(weight, None if bias is None else bias.double().flatten().cpu())
