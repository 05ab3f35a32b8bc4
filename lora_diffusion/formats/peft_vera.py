"""VeRA in a PEFT folder: the trained vectors of each layer, and in the config the seed of what all layers share.

base_model.model.<layer>.vera_lambda_d (r), .vera_lambda_b (out)
adapter_config.json              peft_type VERA, r, projection_prng_key, save_projection false
metadata vera_projection         [seed, widest out, widest in], which PEFT finds on the model and this reader needs
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import AdapterFileError

KEY = "lora_diffusion.vera_projection"
_VECTOR = ".vera_lambda_d"


def vera_tensors(layers: Mapping[str, LayerAdapter]) -> dict[str, Tensor]:
    """The vectors under PEFT's names."""
    return {
        f"base_model.model.{name}.vera_lambda_{part}": layer.tensors[part]
        for name, layer in layers.items()
        for part in ("d", "b")
    }


def vera_config(layers: Mapping[str, LayerAdapter], who: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The VeraConfig settings and the metadata. AdapterFileError where layers do not share one pair of projections.

    PEFT takes the sides of the pair from the layers that the folder names; an adapter that lost its widest would be
    another there, and is refused as far as outputs show it.
    """
    ranks = {layer.tensors["d"].numel() for layer in layers.values()}
    stored = {tuple(layer.tensors["projection"].tolist()) for layer in layers.values()}
    if len(ranks) != 1 or len(stored) != 1:
        raise AdapterFileError(
            f"{who}: PEFT's VeRA has one rank and one pair of projections for all layers; it has ranks {sorted(ranks)} "
            f"and projections {sorted(stored)}"
        )
    (rank,), ((seed, out, width),) = ranks, stored
    if (widest := max(layer.tensors["b"].numel() for layer in layers.values())) != out:
        raise AdapterFileError(
            f"{who}: its projections are for {out} outputs and its widest layer has {widest}; PEFT would make others"
        )
    config = {"peft_type": "VERA", "r": rank, "projection_prng_key": seed, "save_projection": False}
    return config | {"vera_dropout": 0.0}, {KEY: json.dumps([seed, out, width])}


def with_projection(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """`tensors`, and beside the vectors of every layer the projection that the metadata names.

    AdapterFileError for VeRA layers without it: the sides of PEFT's own files are those of a model that is not here.
    """
    layers = [key.removesuffix(_VECTOR) for key in tensors if key.endswith(_VECTOR)]
    if not layers:
        return dict(tensors)
    try:
        numbers = json.loads(metadata[KEY])
        projection = torch.tensor(numbers, dtype=torch.int64)
    except KeyError:
        raise AdapterFileError(
            f"VeRA without {KEY!r} in its metadata: the random matrices depend on the widest layer it was trained on"
        ) from None
    except (ValueError, TypeError, RuntimeError, RecursionError):
        raise AdapterFileError(f"metadata {KEY!r} is {metadata[KEY][:60]!r}, expected three whole numbers") from None
    return {**tensors, **{f"{layer}.vera_projection": projection.clone() for layer in layers}}
