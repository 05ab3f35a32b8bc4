"""Random adapters over every linear and convolution of a pipeline, and their dense deltas."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from lora_diffusion import Adapter, LayerAdapter

RANKS = (1, 2, 4)
ALPHAS = (1.0, 2.5, 4.0, 32 / 3)  # the last has no exact float32


def low_rank(layer: nn.Module, rank: int, alpha: float | None) -> LayerAdapter:
    """Random `down` and `up` in the shapes that files have for `layer`."""
    weight = layer.weight
    down = torch.randn(rank, *weight.shape[1:])
    up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2))
    return LayerAdapter("lora", {"down": down, "up": up}, alpha, "tensor")


def over(pipe: object, *components: str, seed: int = 0) -> Adapter:
    """Every linear and convolution of `components`, each with its own rank and alpha."""
    pick = random.Random(seed)
    return Adapter(
        "random",
        {
            component: {
                name: low_rank(layer, pick.choice(RANKS), pick.choice(ALPHAS))
                for name, layer in getattr(pipe, component).named_modules()
                if isinstance(layer, (nn.Linear, nn.Conv2d))
            }
            for component in components
        },
    )


def delta(layer: LayerAdapter) -> Tensor:
    """alpha / rank · up @ down, (out, in · kh · kw), in float64."""
    down, up = (layer.tensors[part].double().flatten(1) for part in ("down", "up"))
    return up @ down * (down.shape[0] if layer.alpha is None else layer.alpha) / down.shape[0]


def assert_loaded_by_diffusers(pipe: object, adapter: Adapter, name: str) -> None:
    """Diffusers' own layers hold exactly the deltas of `adapter`, and no others."""
    for component, layers in adapter.layers.items():
        wrapped = {
            path.removeprefix("text_model."): module
            for path, module in getattr(pipe, component).named_modules()
            if name in getattr(module, "lora_A", {})
        }
        assert wrapped.keys() == {path.removeprefix("text_model.") for path in layers}
        for path, layer in layers.items():
            theirs = wrapped[path.removeprefix("text_model.")].get_delta_weight(name).flatten(1).double()
            torch.testing.assert_close(theirs, delta(layer), rtol=1e-5, atol=1e-5)
