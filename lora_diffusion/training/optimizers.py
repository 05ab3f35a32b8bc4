"""Optimisers by name, the bytes they hold, and their states in and out of checkpoints.

adamw              decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101): torch's
adamw8bit          both moments in 8 bits by blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861): bitsandbytes'
paged-adamw(8bit)  the moments in memory that CUDA pages out to the host when it is short (QLoRA, arXiv 2305.14314)
adafactor          the second moment by row and column sums, no first (Shazeer & Stern 2018, arXiv 1804.04235):
                   transformers', with the learning rate that is set and no schedule of its own
prodigy            finds its own rate d, by which `lr` (1) is multiplied (Mishchenko & Defazio 2023, arXiv 2306.06101):
                   prodigyopt's, with what its page advises for diffusion models
schedule-free      AdamW whose average takes the place of a falling rate (Defazio et al. 2024, arXiv 2405.15682):
                   schedulefree's. Trained is y, measured, drawn and saved x; y comes back to the bit
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError
from lora_diffusion.methods import METHODS
from lora_diffusion.quantize.layers import bitsandbytes
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.sections import LoopConfig
from lora_diffusion.training.trained import Trained

SMALL = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in 32 bits
BLOCK = 256  # numbers that share a scale in 8 bits
_OF_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw8bit": "PagedAdamW8bit"}
_OF_PACKAGES = {"prodigy": ("prodigyopt", "Prodigy"), "schedule-free": ("schedulefree", "AdamWScheduleFree")}
_MORE: dict[str, dict[str, Any]] = {
    "adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    "prodigy": {"safeguard_warmup": True, "use_bias_correction": True},
}


def check_optimizer(config: TrainConfig) -> None:
    """ConfigError where the optimiser's package is missing or does not go with the method; before pictures are seen."""
    name, method = config.train.optimizer, config.adapter.method
    _class(name)
    if name == "schedule-free" and hasattr(METHODS[method], "course"):
        raise ConfigError(
            f"adapter.method = {method!r} looks at gradients after each step, and train.optimizer = {name!r} writes"
            " over them; take another of the two"
        )


def optimizer_for(settings: LoopConfig, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that `settings` name over parameter groups. ConfigError where its package is missing."""
    name, shared = settings.optimizer, {"lr": settings.lr, "weight_decay": settings.weight_decay}
    with redirect_stdout(io.StringIO()):  # Prodigy says how it decays
        made = _class(name)([dict(group) for group in groups], **shared, **_MORE.get(name, {}))
    if name == "schedule-free":
        made.train()  # type: ignore[attr-defined]
    return made


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the denoiser's slots in the last step: for Prodigy d · lr."""
    group = optimizer.param_groups[0]
    return group["lr"] * group.get("d", 1.0)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer, trained: Trained, cap: float | None) -> Generator[None]:
    """While entered, what a schedule-free optimiser trains is its average; afterwards as before, to the bit.

    Nothing for other optimisers. `cap` bounds the deltas as in training.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    with torch.no_grad():
        before = [(parameter, parameter.detach().clone()) for parameter in trained.parameters()]
        optimizer.eval()  # type: ignore[attr-defined]
        if cap is not None:
            trained.cap(cap)
    try:
        yield
    finally:
        with torch.no_grad():
            optimizer.train()  # type: ignore[attr-defined]
            for parameter, values in before:  # its own way back rounds
                parameter.copy_(values)


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
    if name == "prodigy":
        return 16 * count
    if name.endswith("8bit") and count >= SMALL:
        return 2 * (count + 4 * -(-count // BLOCK))
    return 8 * count


def _class(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor
    if name in _OF_PACKAGES:
        package, kind = _OF_PACKAGES[name]
        try:
            return getattr(import_module(package), kind)
        except ImportError:
            raise ConfigError(
                f"train.optimizer = {name!r} needs {package}, which is not installed; pip install"
                " 'lora-diffusion[optimizers]' or use 'adamw'"
            ) from None
    try:
        library = bitsandbytes()
    except ConfigError:
        raise ConfigError(
            f"train.optimizer = {name!r} needs bitsandbytes, which cannot be imported; install it or use 'adamw'"
        ) from None
    return getattr(library.optim, _OF_BITSANDBYTES[name])
