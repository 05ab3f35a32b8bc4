"""Which linear layer becomes what, and why the others stay in 16 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import nn

from lora_diffusion.errors import ConfigError, TargetError, did_you_mean
from lora_diffusion.quantize.contents import frozen_modules
from lora_diffusion.quantize.layers import is_quantized

__all__ = ["ADALN", "DTYPES", "Fate", "Precision", "plan", "reason_for"]

Precision = Literal["nf4", "int8", "bf16", "fp16", "fp32"]

#: precisions that are a dtype
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: first part of a layer's name -> why everything under it stays in 16 bits, in every family
KEPT = {
    "embedder: its few values steer every layer": (
        *("*embed", "*embedder", "*embedding", "encoder_hid_proj", "img_in", "txt_in"),
        *("caption_projection", "adaln_single", "time_step_proj"),
    ),
    "output projection: its error lands in the picture": (
        *("proj_out", "norm_out", "all_final_layer", "text_projection", "lm_head"),
    ),
}

#: layers that turn the timestep into scales and shifts (a quarter of FLUX); in 16 bits or int8 on request
ADALN = (
    *("*.norm.linear", "*.norm1.linear", "*.norm1_context.linear", "*.adaLN_modulation*", "*_stream_modulation*"),
    *("*.img_mod*", "*.txt_mod*", "*.time_emb_proj", "distilled_guidance_layer*"),
)

#: T5's feed-forward casts its input to this weight's dtype, unless that is int8; 4-bit weights are uint8
EIGHT_BITS_AT_LEAST = ("*.DenseReluDense.wo",)

_OTHER_KINDS = {
    "Conv": "convolution: there is no 4-bit one",
    "Norm": "normalisation: a handful of values",
    "Embedding": "table: looked up, never multiplied",
}


@dataclass(frozen=True)
class Fate:
    """What becomes of one linear layer."""

    stored: Literal["nf4", "int8", "kept"]
    reason: str


def plan(
    model: nn.Module, precision: Precision, *, keep: Sequence[str], eight_bit: Sequence[str], keep_adaln: bool
) -> dict[str, Fate]:
    """Linear layer -> fate, or nothing when `precision` is a dtype. Raises as `quantize` says."""
    if precision not in get_args(Precision):
        near = did_you_mean(precision, get_args(Precision))
        raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}{near}")
    linear = {name: layer for name, layer in frozen_modules(model) if isinstance(layer, nn.Linear)}
    for glob in (*keep, *eight_bit):
        if glob not in ADALN and not any(_below(name, glob) for name in linear):
            raise TargetError(f"{glob!r} matches no linear layer of the model{did_you_mean(glob, linear)}")
    if precision in DTYPES:
        return {}
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    fates: dict[str, Fate] = {}
    for name, layer in linear.items():
        reason = _why_kept(name, layer, keep, keep_adaln=keep_adaln)
        if reason is None and uses[id(layer.weight)] > 1:
            reason = "its weight is shared with another layer"
        fates[name] = Fate("kept", reason) if reason else _fate(name, layer, precision, eight_bit)
    return fates


def reason_for(kind: str) -> str:
    """Why a module of that class, not a linear layer, stays as it is."""
    return next((why for part, why in _OTHER_KINDS.items() if part in kind), "not a linear layer")


def _why_kept(name: str, layer: nn.Linear, keep: Sequence[str], *, keep_adaln: bool) -> str | None:
    if getattr(layer, "adapters", None) is not None:
        raise ConfigError(f"layer {name!r} has adapters on it; quantise the model first and attach them afterwards")
    if is_quantized(layer):
        return "quantised already"
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__}: not a plain linear layer"
    if any(_below(name, glob) for glob in keep):
        return "kept on request"
    if keep_adaln and any(_below(name, glob) for glob in ADALN):
        return "timestep modulation: kept on request"
    top = name.split(".", 1)[0]
    return next((why for why, globs in KEPT.items() if any(fnmatchcase(top, glob) for glob in globs)), None)


def _fate(name: str, layer: nn.Linear, precision: Precision, eight_bit: Sequence[str]) -> Fate:
    if precision == "int8" or any(_below(name, glob) for glob in eight_bit):
        return Fate("int8", "linear layer")
    if any(_below(name, glob) for glob in EIGHT_BITS_AT_LEAST):
        return Fate("int8", "T5 feed-forward: casts its input to a 4-bit weight's bytes")
    # bitsandbytes would run the C++ compiler for each odd shape on a CPU (seconds each), and transposes a lone pair
    if layer.in_features % 2 or layer.weight.numel() <= 2:
        return Fate("int8", "odd width: 4-bit weights come in pairs")
    return Fate("nf4", "linear layer")


def _below(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")
