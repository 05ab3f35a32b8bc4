"""The order of batches: deterministic, resumable, every batch from one group (bucket).

Where training stands is three numbers, (seed, epoch, position); the order of an epoch follows from the first two.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from lora_diffusion.errors import ConfigError, DataError

__all__ = ["Batch", "BatchSampler", "Draw"]


@dataclass(frozen=True)
class Draw:
    """Something to draw: which group it can share a batch with, and how often it comes per epoch (0.5: every other)."""

    group: Hashable
    share: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Positions in the list of draws, and where in training the batch stands."""

    members: tuple[int, ...]
    epoch: int
    position: int


class BatchSampler:
    """Batches without end. Iterating goes on from where it stands; `state` and `restore` move it.

    Of several processes, number `rank` of `world` gets every `world`-th batch; the last round of an epoch is filled
    up from its start, so that all have equally many. DataError for nothing to draw.
    """

    def __init__(self, draws: Sequence[Draw], batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if not draws or not any(draw.share > 0 for draw in draws):
            raise DataError("there is nothing to draw batches from")
        if batch_size < 1 or not 0 <= rank < world:
            raise ConfigError(
                f"batch_size is {batch_size}, rank {rank} of {world}; expected 1 or more and rank < world"
            )
        self.draws, self.batch_size = tuple(draws), batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batches = self.batches_of(self.epoch)
            if self.position >= len(batches):
                self.epoch, self.position = self.epoch + 1, 0
                continue
            self.position += 1  # before the yield: the state then says what comes next
            yield Batch(batches[self.position - 1], self.epoch, self.position - 1)

    def batches_of(self, epoch: int) -> list[tuple[int, ...]]:
        """This process's batches of an epoch, in order. The last batch of a group may be smaller than the others."""
        random = Random(f"{self.seed}/{epoch}/order")
        groups: dict[Hashable, list[int]] = {}
        for index, draw in enumerate(self.draws):
            times = math.floor(draw.share) + (random.random() < draw.share % 1)
            groups.setdefault(draw.group, []).extend([index] * times)
        batches: list[tuple[int, ...]] = []
        for members in groups.values():
            random.shuffle(members)
            batches += [tuple(members[i : i + self.batch_size]) for i in range(0, len(members), self.batch_size)]
        random.shuffle(batches)
        rounds = math.ceil(len(batches) / self.world)
        return [batches[i % len(batches)] for i in range(self.rank, rounds * self.world, self.world)]

    def state(self) -> dict[str, int]:
        """Seed, epoch and position of the next batch."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`. ConfigError if it is another seed's."""
        if state["seed"] != self.seed:
            raise ConfigError(f"the checkpoint was made with seed {state['seed']}, this run has seed {self.seed}")
        self.epoch, self.position = state["epoch"], state["position"]
