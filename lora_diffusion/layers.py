"""What can be adapted, linear layers of any precision, plain convolutions, norms, attentions, and its geometry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_linear(layer: nn.Module) -> bool:
    """Whether it maps `in_features` to `out_features` by a weight: nn.Linear, Linear4bit, Linear8bitLt, GGUF, …"""
    weighty = isinstance(getattr(layer, "weight", None), Tensor)
    return weighty and isinstance(getattr(layer, "in_features", None), int) and hasattr(layer, "out_features")


#: over pictures and over videos
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def is_convolution(layer: nn.Module) -> bool:
    """Whether it is a 2-D or 3-D convolution whose low-rank form is two convolutions: zero padding, one group."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == 1 and layer.padding_mode == "zeros"


def is_norm(layer: nn.Module) -> bool:
    """Whether it is torch's LayerNorm, GroupNorm or RMSNorm, or Diffusers' own RMSNorm, and has a scale."""
    known = isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
    known = known or (type(layer).__name__ == "RMSNorm" and hasattr(layer, "eps"))
    return known and isinstance(getattr(layer, "weight", None), Tensor)


def is_attention(layer: nn.Module) -> bool:
    """Whether it is an attention of Diffusers from queries `to_q` to an output `to_out[0]`, and nothing round them.

    The attentions of VAEs, which normalise and add their input themselves, are not, nor those without an output layer.
    """
    query, outputs = getattr(layer, "to_q", None), getattr(layer, "to_out", None)
    plain = isinstance(getattr(layer, "heads", None), int) and not getattr(layer, "residual_connection", False)
    plain = plain and getattr(layer, "group_norm", None) is None and getattr(layer, "rescale_output_factor", 1) == 1
    ends = isinstance(query, nn.Module) and isinstance(outputs, nn.ModuleList) and len(outputs) > 0
    return plain and ends and is_linear(query) and is_linear(outputs[0])  # type: ignore[arg-type]


def is_adaptable(layer: nn.Module) -> bool:
    """Whether an adapter of any kind could have a weight of its own there: it has numbers, or is an attention."""
    return isinstance(getattr(layer, "weight", None), Tensor) or is_attention(layer)


_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
#: own names of the projections that Diffusers can fuse
FUSIBLE = frozenset(name for of in _FUSED.values() for name in of)


def is_bypassed(attention: nn.Module, name: str) -> bool:
    """Whether Diffusers fused the attention's projections (`fuse_qkv_projections`) and now computes past this one.

    After unfusing it may keep the fused layers (U-Nets, whose processor then says so) or not.
    """
    if not vars(attention).get("fused_projections"):  # a search through attributes would take longer
        return False
    fused = type(getattr(attention, "processor", None)).__name__.startswith("Fused")
    there = vars(attention)["_modules"]
    return (fused or hasattr(attention, "unfuse_projections")) and any(
        name in of and by in there for by, of in _FUSED.items()
    )


def core(layer: nn.Module) -> nn.Module:
    """The layer whose weight says device and precision: the queries' of an attention, else the layer itself."""
    query = vars(layer)["_modules"].get("to_q")  # a search through attributes would take longer
    return query if query is not None and is_attention(layer) else layer


def submodule(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule(name)`, ten times as fast; KeyError where there is none."""
    for part in name.split(".") if name else ():
        model = vars(model)["_modules"][part]
    return model


def frozen_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as it is stored (packed bytes for 4-bit layers)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def kernel_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of one row of `down`: (in,) or (in[, kt], kh, kw), whatever the packing of the weight."""
    if isinstance(layer, CONVOLUTIONS):
        return (layer.in_channels, *layer.kernel_size)
    assert isinstance(layer.in_features, int)
    return (layer.in_features,)


def out_width(layer: nn.Module) -> int:
    """Output features or channels."""
    width = layer.out_channels if isinstance(layer, CONVOLUTIONS) else layer.out_features
    assert isinstance(width, int)
    return width


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """(out, in) or (out, in[, kt], kh, kw), whatever the packing of the weight."""
    return (out_width(layer), *kernel_shape(layer))


def convolution_arguments(layer: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments of `F.conv2d` or `F.conv3d` for a convolution's `down`; None for linear layers."""
    if not isinstance(layer, CONVOLUTIONS):
        return None
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The floating dtype a layer computes in; a 4-bit or 8-bit layer says so itself or by its bias."""
    weight = frozen_weight(layer)
    if weight.is_floating_point():
        return weight.dtype
    declared, bias = getattr(layer, "compute_dtype", None), getattr(layer, "bias", None)
    if isinstance(declared, torch.dtype):
        return declared
    return bias.dtype if isinstance(bias, Tensor) else torch.float32
