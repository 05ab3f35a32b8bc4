"""Optimisers by name, the bytes they hold, and their states in and out of checkpoints.

adamw              decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101): torch's
adamw8bit          both moments in 8 bits by blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861): bitsandbytes'
paged-adamw(8bit)  the moments in memory that CUDA pages out to the host when it is short (QLoRA, arXiv 2305.14314)
adafactor          the second moment by row and column sums, no first (Shazeer & Stern 2018, arXiv 1804.04235):
                   transformers', with the learning rate that is set and no schedule of its own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError
from lora_diffusion.quantize.layers import bitsandbytes
from lora_diffusion.training.sections import LoopConfig

SMALL = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in 32 bits
BLOCK = 256  # numbers that share a scale in 8 bits
_OF_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw8bit": "PagedAdamW8bit"}


def optimizer_for(settings: LoopConfig, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that `settings` name over parameter groups. ConfigError where its package is missing."""
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    return _class(settings.optimizer)([dict(group) for group in groups], **shared, **_more(settings.optimizer))


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict()` with plain tensors and numbers (bitsandbytes' own nests some of them)."""
    return torch.optim.Optimizer.state_dict(optimizer)


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from a checkpoint's state; what was paged is paged again."""
    optimizer.load_state_dict(dict(state))
    if not getattr(optimizer, "is_paged", False):
        return
    paged: Callable[..., Tensor] = optimizer.get_state_buffer  # type: ignore[attr-defined]
    for parameter, values in optimizer.state.items():
        for key in ("state1", "state2"):
            buffer = paged(parameter, dtype=values[key].dtype)
            values[key] = buffer.copy_(values[key])


def optimizer_bytes(name: str, parameters: Sequence[Tensor]) -> int:
    """What the optimiser holds for float32 `parameters`, paged memory included."""
    return sum(_bytes(name, parameter) for parameter in parameters)


def _bytes(name: str, parameter: Tensor) -> int:
    count, shape = parameter.numel(), parameter.shape
    if name == "adafactor":
        whole = 1 if len(shape) < 2 else 1 / shape[-1] + 1 / shape[-2]
        return round(4 * count * whole)
    if name.endswith("8bit") and count >= SMALL:
        return 2 * (count + 4 * -(-count // BLOCK))
    return 8 * count


def _class(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor
    try:
        library = bitsandbytes()
    except ConfigError:
        raise ConfigError(
            f"train.optimizer = {name!r} needs bitsandbytes, which cannot be imported; install it or use 'adamw'"
        ) from None
    return getattr(library.optim, _OF_BITSANDBYTES[name])


def _more(name: str) -> dict[str, Any]:
    if name == "adafactor":
        return {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return {}
