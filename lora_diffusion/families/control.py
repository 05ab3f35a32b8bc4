"""BFL's Control LoRAs for FLUX.1 (Depth, Canny): a control picture's channels enter beside those of the latents.

They hold pairs with biases for every layer, whole scales of the norms of queries and keys, and an `img_in` that reads
twice the channels. Diffusers widens the model while it loads them; here that is a step of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_diffusion.adapter import LayerAdapter


def widen_for_control(pipe: Any) -> None:
    """Give FLUX's `x_embedder` as many channels again, of weight 0: a FluxControlPipeline over it can then be called.

    Without a Control LoRA it then draws as before, whatever the control picture.
    """
    model = pipe.transformer
    narrow: nn.Linear = model.x_embedder
    wide = nn.Linear(2 * narrow.in_features, narrow.out_features, device="meta")
    frozen = narrow.weight.detach()
    wide.weight = nn.Parameter(torch.cat([frozen, torch.zeros_like(frozen)], 1), narrow.weight.requires_grad)
    wide.bias = narrow.bias
    model.x_embedder = wide
    model.register_to_config(in_channels=wide.in_features, out_channels=model.out_channels)


def control_hint(model: nn.Module, target: str, layer: LayerAdapter) -> str:
    """What to add to the fault of a layer that a Control LoRA has wider than the model; "" for all others."""
    live = getattr(model, target, None) if type(model).__name__ == "FluxTransformer2DModel" else None
    down = layer.tensors.get("down")
    if target != "x_embedder" or not isinstance(live, nn.Linear) or down is None or down.shape[-1] <= live.in_features:
        return ""
    return (
        f"; this is a Control LoRA, which reads a control picture's channels too, {down.shape[-1]} in all: use a"
        " FluxControlPipeline, and before that widen_for_control(pipe) of lora_diffusion.families.control"
    )
