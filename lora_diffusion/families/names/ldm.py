"""U-Nets of Stable Diffusion 1, 2 and XL by the names of the original code (CompVis ldm, Stability sgm).

There the blocks are one numbered list: with L resnets a level,

    input_blocks.{1 + level·(L+1) + j}.0 / .1     down_blocks.{level}.resnets.{j} / .attentions.{j}
    input_blocks.{1 + level·(L+1) + L}.0.op       down_blocks.{level}.downsamplers.0.conv
    middle_block.0 / .1 / .2                      mid_block.resnets.0 / .attentions.0 / .resnets.1
    output_blocks.{level·(L+1) + j}.0 / .1        up_blocks.{level}.resnets.{j} / .attentions.{j}
    output_blocks.{level·(L+1) + L}.(1|2).conv    up_blocks.{level}.upsamplers.0.conv
"""

from __future__ import annotations

import re
from collections.abc import Collection

CLASSES = ("UNet2DConditionModel",)

_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def names(live: Collection[str]) -> dict[str, str]:
    """Original name -> live name, of every layer of a U-Net."""
    resnets = [int(found[4]) for name in live if (found := _BLOCK.match(name)) and found[1] == "down"]
    level = max(resnets, default=0) + 2  # L + 1: going down L resnets and a downsampler, going up L + 1 resnets
    attends = {name.split(".attentions.")[0] for name in live if ".attentions." in name}
    return {_FIXED[name]: name for name in live if name in _FIXED} | {
        original: name for name in live if (original := _original(name, level, attends))
    }


def _original(name: str, level: int, attends: set[str]) -> str | None:
    found = _BLOCK.match(name)
    if not found:
        return None
    side, block, kind, number, rest = found.groups()
    layer = _RESNET.get(rest, rest) if kind == "resnets" else rest
    at = 0 if kind == "resnets" else 1
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{layer}"
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * level}.0.op"
    if kind == "upsamplers":
        last = int(block) * level + level - 1
        return f"output_blocks.{last}.{2 if f'up_blocks.{block}' in attends else 1}.conv"
    if side == "down":
        return f"input_blocks.{1 + int(block) * level + int(number)}.{at}.{layer}"
    return f"output_blocks.{int(block) * level + int(number)}.{at}.{layer}"
