"""Fusing: the weighted sum written into the frozen weights, and the originals back bit for bit.

The originals are kept in the host's memory, not computed back: bf16 weights would not survive W + D - D. Weights that
are there already are exchanged and not written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError, some
from lora_diffusion.layers import frozen_weight
from lora_diffusion.lora import Slot
from lora_diffusion.methods import METHODS, bias_change, is_dense
from lora_diffusion.packing import unrecorded

Shares = Mapping[str, LayerAdapter]  # adapter -> its share of one layer


@dataclass
class Fusion:
    """What was fused: each weight and its original values."""

    kept: list[tuple[Tensor, Tensor]]

    def undo(self) -> None:
        """Bring the originals back; the gates are whoever's who owns them."""
        for weight, original in reversed(self.kept):  # layers may share a weight
            if (weight.device, weight.dtype) == (original.device, original.dtype):
                weight.data = original
            else:
                weight.data.copy_(original)
        self.kept = []


def fuse(layers: Mapping[str, tuple[nn.Module, Slot, Shares]]) -> Fusion:
    """Merge each slot into its layer (name -> layer, slot, what each adapter has there) and put it to sleep.

    ConfigError, and nothing changed, where a weight is not stored as floating-point numbers, where an adapter changes a
    bias that the layer does not have, and for a method that is no change of a weight.
    """
    awake = {name: parts for name, parts in layers.items() if not parts[1].idle}
    for name, (layer, slot, shares) in awake.items():
        slot.put_back(layer)
        if other := [one.method for one in shares.values() if not is_dense(one.method)]:
            raise ConfigError(f"fuse: {name} carries {some(other)}, which is no change of a weight; use it unfused")
        weight = frozen_weight(layer)
        if not weight.is_floating_point() or weight.is_meta:
            raise ConfigError(f"fuse: {name} ({type(layer).__name__}) is quantised or offloaded; use it unfused")
        if getattr(layer, "bias", None) is None and any(bias_change(one) is not None for one in shares.values()):
            raise ConfigError(f"fuse: {name} has no bias, and an adapter changes one; use it unfused")
    fusion = Fusion([])
    try:
        with unrecorded():
            _write(awake, fusion)
    except BaseException:  # no memory left, say
        fusion.undo()
        raise
    for _, slot, _ in awake.values():
        slot.gate.zero_()  # compiled code reads the gate alone
        slot.fusion = fusion
    return fusion


def _write(layers: Mapping[str, tuple[nn.Module, Slot, Shares]], fusion: Fusion) -> None:
    for layer, slot, shares in layers.values():
        changed = [(frozen_weight(layer), fused_weight(layer, slot, shares))]
        if (bias := _fused_bias(layer, slot, shares)) is not None:
            changed.append(bias)
        for tensor, new in changed:
            if tensor.is_cpu:  # the fused weight takes the original's place, and that is kept as it is
                fusion.kept.append((tensor, tensor.data))
                tensor.data = new.to(tensor.dtype)
            else:
                fusion.kept.append((tensor, tensor.detach().to("cpu", copy=True)))
                tensor.data.copy_(new)


def fused_weight(layer: nn.Module, slot: Slot, shares: Shares) -> Tensor:
    """The layer's weight with all that its slot adds to it, rounded once, in the weight's dtype.

    What is no low-rank pair is its method's dense change, taken of the frozen weight, times its number in the gate.
    """
    weight = frozen_weight(layer)
    if not slot.branches:
        return slot.merged(weight)
    total = slot.merged(weight.float()) if len(slot.down) else weight.float()
    for name, number in _numbers(slot):
        share = shares[name]
        total = total + number * METHODS[share.method].delta(share, layer).to(total.device).view_as(total)
    return total.to(weight.dtype)


def _fused_bias(layer: nn.Module, slot: Slot, shares: Shares) -> tuple[Tensor, Tensor] | None:
    if not slot.branches:
        return None
    bias = getattr(layer, "bias", None)
    found = [(number, bias_change(shares[name])) for name, number in _numbers(slot)]
    changes = [number * change.float() for number, change in found if change is not None]
    if not isinstance(bias, Tensor) or not changes:
        return None
    return bias, bias.float() + torch.stack([change.flatten().to(bias.device) for change in changes]).sum(dim=0)


def _numbers(slot: Slot) -> list[tuple[str, float]]:
    """Every branch's adapter and its number in the gate."""
    first, branches = len(slot.pairs), len(slot.branches)
    row = sum(rank for _, rank, _ in slot.pairs)
    names = [name for name, _, _ in slot.entries[first:]]
    return list(zip(names, slot.gate[row : row + branches].tolist(), strict=True))
