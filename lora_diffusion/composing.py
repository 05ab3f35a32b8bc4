"""Composition modes: how the adapters of a stack act together in the denoiser, and what that costs.

sum         all of them in every step: one weighted sum of their changes            1 denoiser call a step
switch      one after the other, `every` steps each, in the order they were added   1
composite   each alone, and the mean of what it predicts                            as many as adapters, as one batch

Switch and Composite are LoRA Switch and LoRA Composite of Zhong et al. 2024, arXiv 2402.16843. There, k adapters give

    e(z) = 1/k Σ_i [ e_i(z, ∅) + s (e_i(z, c) - e_i(z, ∅)) ]

which is the guidance s on the mean of e_i(z, ∅) and the mean of e_i(z, c): the mean is taken first, so that every
pipeline's own guidance stays in place. Each adapter acts at its own weight. Text encoders run once, before the first
step, and take the sum. Where images have their own mixes, each goes by the adapters that are on for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError, did_you_mean
from lora_diffusion.gates import Level, at_image, images_of

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

    def turns(self, members: Sequence[Sequence[str]], step: int) -> tuple[str | None, ...]:
        """Whose turn it is in each image, by the names that take part there."""
        return tuple(self.turn(names, step) for names in members)

    def times(self, names: Sequence[str]) -> int:
        """How often the batch is repeated."""
        return max(1, len(names)) if self.mode == "composite" else 1


def members_of(levels: Collection[tuple[str, Level]], order: Sequence[str]) -> list[list[str]]:
    """The adapters that are on in each image, in their order, by (adapter, level); one list where all have the same."""
    images = range(math.lcm(*(images_of(level) for _, level in levels)))
    on = [{name for name, level in levels if at_image(level, image) != 0.0} for image in images]
    there = [[name for name in order if name in names] for names in on]
    return there if any(names != there[0] for names in there) else there[:1]


def in_turn(level: Level, name: str, turns: Sequence[str | None]) -> Level:
    """`level` of an adapter in the images where it is its turn, 0 in the others; unchanged where there is one turn."""
    if len(turns) == 1:
        return level
    return tuple(at_image(level, image) if turn in (None, name) else 0.0 for image, turn in enumerate(turns))


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


def averaged(out: Any, shares: Tensor) -> Any:
    """A denoiser's output for a batch repeated so: the mean over the repetitions, taken in float32.

    `shares` (repetitions, images) say how much each counts in an image, 1 in all; the batch is k times these images.
    """
    if isinstance(out, Tensor):
        each = out.unflatten(0, (len(shares), -1, shares.shape[1])).float()  # (repetitions, k, images, …)
        counted = shares.to(out.device).view(len(shares), 1, -1, *(1 for _ in out.shape[1:]))
        return (each * counted).sum(dim=0).flatten(0, 1).to(out.dtype)
    if isinstance(out, Mapping):  # a Diffusers output class, which is a dictionary too
        return type(out)(**{key: averaged(one, shares) for key, one in out.items()})
    return type(out)(averaged(one, shares) for one in out) if isinstance(out, tuple | list) else out


def shares_of(names: Sequence[str], members: Sequence[Sequence[str]]) -> Tensor:
    """(names, images): the part of each adapter in the mean of each image; all alike where none takes part."""
    counts = torch.tensor([[float(name in there or not there) for there in members] for name in names])
    return counts / counts.sum(dim=0)


def alone(gate: Tensor, place: int, times: int, batch: int) -> Tensor:
    """The gate of one adapter, (1 or batch, places, 1), in its own repetition of the batch; zero in the others."""
    spread = gate.new_zeros(times, batch, *gate.shape[1:])
    spread[place] = gate
    return spread.flatten(0, 1)
