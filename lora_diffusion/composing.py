"""Composition modes: how the adapters of a stack act together in the denoiser, and what that costs.

sum         all of them in every step: one weighted sum of their changes            1 denoiser call a step
switch      one after the other, `every` steps each, in the order they were added   1
composite   each alone, and the mean of what it predicts                            as many as adapters, as one batch

Switch and Composite are LoRA Switch and LoRA Composite of Zhong et al. 2024, arXiv 2402.16843. There, k adapters give

    e(z) = 1/k Σ_i [ e_i(z, ∅) + s (e_i(z, c) - e_i(z, ∅)) ]

which is the guidance s on the mean of e_i(z, ∅) and the mean of e_i(z, c): the mean is taken first, so that every
pipeline's own guidance stays in place. Each adapter acts at its own weight. Text encoders run once, before the first
step, and take the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError, did_you_mean

MODES = ("sum", "switch", "composite")

#: inputs of a denoiser whose first axis is not the batch
_UNBATCHED = ("img_ids", "txt_ids", "image_rotary_emb")


@dataclass(frozen=True)
class Composition:
    """A mode; for "switch" the steps of one turn; and whether adapters are brought to one norm in each layer."""

    mode: str = "sum"
    every: int = 5
    balance: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            there = f"there are {', '.join(MODES)}{did_you_mean(self.mode, MODES)}"
            raise ConfigError(f"no composition mode {self.mode!r}; {there}")
        every: Any = self.every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"compose: every is {every!r}; expected a number of steps, at least 1")

    def turn(self, names: Sequence[str], step: int) -> str | None:
        """Whose turn it is in a step (from 0) among the adapters that take part; None: everybody's."""
        return names[step // self.every % len(names)] if self.mode == "switch" and names else None

    def times(self, names: Sequence[str]) -> int:
        """How often the batch is repeated."""
        return max(1, len(names)) if self.mode == "composite" else 1


def repeated(given: Any, batch: int, times: int) -> Any:
    """A denoiser's inputs with the batch repeated as a block: in tensors, and in containers of them."""
    if isinstance(given, Tensor):
        return given.repeat(times, *(1 for _ in given.shape[1:])) if given.dim() and len(given) == batch else given
    if isinstance(given, Mapping):
        return {key: one if key in _UNBATCHED else repeated(one, batch, times) for key, one in given.items()}
    if isinstance(given, list) and len(given) == batch and not any(isinstance(one, Tensor) for one in given):
        return given * times  # by image, such as the shapes of packed latents
    if isinstance(given, list | tuple):
        return type(given)(repeated(one, batch, times) for one in given)
    return given


def averaged(out: Any, times: int) -> Any:
    """A denoiser's output for a batch repeated so: the mean over the repetitions, taken in float32."""
    if isinstance(out, Tensor):
        return out.unflatten(0, (times, -1)).mean(dim=0, dtype=torch.float32).to(out.dtype)
    if isinstance(out, Mapping):  # a Diffusers output class, which is a dictionary too
        return type(out)(**{key: averaged(one, times) for key, one in out.items()})
    return type(out)(averaged(one, times) for one in out) if isinstance(out, tuple | list) else out


def alone(gate: Tensor, place: int, times: int, batch: int) -> Tensor:
    """The gate of one adapter, (1 or batch, places, 1), in its own repetition of the batch; zero in the others."""
    spread = gate.new_zeros(times, batch, *gate.shape[1:])
    spread[place] = gate
    return spread.flatten(0, 1)
