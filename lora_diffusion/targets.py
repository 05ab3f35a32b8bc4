"""Which layers an adapter goes on: presets for U-Nets, diffusion transformers and text encoders, and globs.

A target is a preset, presets joined by "+" ("attention+ff+conv"), a glob over layer names
("up_blocks.*.attn2.to_*"), or a list of these. Every part must match something. Normalisations and whole attentions are
found by the presets "norm" and "attention-blocks", and by a glob that matches nothing else, such as "*.attn2".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lora_diffusion.errors import TargetError, did_you_mean, some
from lora_diffusion.layers import is_attention, is_convolution, is_linear, is_norm
from lora_diffusion.lora import SLOT

Targets = str | Sequence[str]


def _linear(pattern: str) -> Callable[[str, nn.Module], bool]:
    ending = re.compile(rf"(^|\.)({pattern})$")
    return lambda name, layer: is_linear(layer) and ending.search(name) is not None


# U-Net and transformer attention (joint attention included), CLIP, T5, then Gemma and Qwen encoders
_QV = r"to_[qv]|add_[qv]_proj|to_qkv|to_added_qkv|to_qkv_mlp_proj|self_attn\.[qv]_proj|SelfAttention\.[qv]"
_KO = r"to_k|add_k_proj|to_out(\.0)?|to_add_out|self_attn\.(k|o|out)_proj|SelfAttention\.[ko]"
_FF = (
    r"ff(_context)?\.net\.\d+(\.proj)?|ff(_context)?\.linear_(in|out)|(img|txt)_mlp\.net\.\d+(\.proj)?"
    r"|feed_forward\.\w+|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)|to_qkv_mlp_proj"
    r"|mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)|DenseReluDense\.w[io](_\d)?"
)

_is_ff = _linear(_FF)


def _is_mix(name: str, layer: nn.Module) -> bool:
    """The 1x1 convolutions of Sana's feed-forward (GLUMBConv), linear layers in all but shape."""
    return is_convolution(layer) and re.search(r"(^|\.)ff\.conv_(inverted|point)$", name) is not None


PRESETS: dict[str, Callable[[str, nn.Module], bool]] = {
    "attention": _linear(f"{_QV}|{_KO}"),  # q, k, v and out
    "attention-qv": _linear(_QV),  # as in Hu et al. 2021, section 4.2
    "ff": lambda name, layer: _is_ff(name, layer) or _is_mix(name, layer),
    "all-linear": lambda name, layer: is_linear(layer),
    "conv": lambda name, layer: is_convolution(layer),
    "norm": lambda name, layer: is_norm(layer),
    "attention-blocks": lambda name, layer: is_attention(layer),  # as a whole, for prefix tuning
}


def _is_aside(layer: nn.Module) -> bool:
    return is_norm(layer) or is_attention(layer)


def find_targets(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Layer name -> layer, in the model's order. TargetError for a part that matches no layer."""
    layers = _adaptable(model)
    parts = [part.strip() for target in ([targets] if isinstance(targets, str) else targets) for part in _split(target)]
    if not parts:
        raise TargetError("targets: nothing is named; expected a preset, a glob or a list of them")
    chosen: set[str] = set()
    for part in parts:
        matches = {name for name, layer in layers.items() if _matches(part, name, layer)}
        matches = {name for name in matches if part in PRESETS or not _is_aside(layers[name])} or matches
        if not matches:
            raise TargetError(_no_match(part, model, layers))
        chosen |= matches
    return {name: layer for name, layer in layers.items() if name in chosen}


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """What could be a target; of a layer that another library has wrapped, such as PEFT, the whole alone."""
    found, whole = dict[str, nn.Module](), "\0"
    for name, layer in model.named_modules():
        if not name or name.startswith(whole) or SLOT in name.split("."):
            continue
        if is_linear(layer) or is_convolution(layer):
            whole = f"{name}."
        elif not _is_aside(layer):
            continue
        found[name] = layer
    return found


def _split(target: str) -> list[str]:
    return target.split("+") if all(part.strip() in PRESETS for part in target.split("+")) else [target]


def _matches(part: str, name: str, layer: nn.Module) -> bool:
    preset = PRESETS.get(part)
    return preset(name, layer) if preset else fnmatchcase(name, part)


def _no_match(part: str, model: nn.Module, layers: dict[str, nn.Module]) -> str:
    near = did_you_mean(part, [name for name in (*PRESETS, *layers) if name != part])
    hint = near or f"; there are presets {', '.join(PRESETS)} and layers such as {some(list(layers))}"
    return f"target {part!r} matches no linear, convolution or norm layer of {type(model).__name__}{hint}"
