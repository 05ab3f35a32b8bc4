"""Cached latents and text embeddings in memory, and which of them make up which batch.

Everything random is a function of (seed, step, part): the same step draws the same pictures, captions, noise
and times on any machine layout and after any interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Item:
    """One picture ready for the denoiser: its latents (channels, h, w) and the rows of its captions."""

    name: str
    latents: Tensor
    captions: tuple[int, ...]  # rows of the conditioning table; row 0 is the empty caption


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape: latents (n, channels, h, w), conditioning (n, …), where they came from."""

    latents: Tensor
    conditioning: dict[str, Tensor]
    names: tuple[str, ...]


class Batches:
    """Draws batches from items; only pictures of the same shape go together."""

    def __init__(
        self, items: Sequence[Item], table: dict[str, Tensor], *, size: int, seed: int, dropout: float = 0.0
    ) -> None:
        self.items, self.table, self.size, self.seed, self.dropout = list(items), table, size, seed, dropout
        self._epochs: dict[int, list[list[int]]] = {}

    def draw(self, index: int) -> Batch:
        """The batch number `index` (0, 1, …) of the whole run: epochs are shuffled, every picture once in each."""
        per_epoch = len(self._epoch(0))
        chosen = self._epoch(index // per_epoch)[index % per_epoch]
        return self._collate(chosen, generator_for(self.seed, "captions", index))

    def in_order(self) -> list[Batch]:
        """All items once, first captions, no dropout: to measure on."""
        groups = [group[i : i + self.size] for group in self._shapes() for i in range(0, len(group), self.size)]
        return [self._collate(group, None) for group in groups]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            generator = generator_for(self.seed, "epoch", epoch)
            batches: list[list[int]] = []
            for group in self._shapes():
                order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
                order += order[: -len(order) % self.size]  # the last batch is filled from the front
                while len(order) % self.size:
                    order += order[: self.size - len(order) % self.size]
                batches += [order[i : i + self.size] for i in range(0, len(order), self.size)]
            self._epochs = {0: self._epochs.get(0, batches), epoch: self._shuffled(batches, generator)}
        return self._epochs[epoch]

    @staticmethod
    def _shuffled(batches: list[list[int]], generator: torch.Generator) -> list[list[int]]:
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _shapes(self) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(self.items):
            groups.setdefault(tuple(item.latents.shape), []).append(index)
        return list(groups.values())

    def _collate(self, chosen: list[int], generator: torch.Generator | None) -> Batch:
        items = [self.items[i] for i in chosen]
        rows = torch.tensor([self._caption(item, generator) for item in items])
        conditioning = {name: values[rows] for name, values in self.table.items()}
        return Batch(torch.stack([item.latents for item in items]), conditioning, tuple(item.name for item in items))

    def _caption(self, item: Item, generator: torch.Generator | None) -> int:
        if generator is None:
            return item.captions[0]
        if torch.rand((), generator=generator).item() < self.dropout:
            return 0
        return item.captions[int(torch.randint(len(item.captions), (), generator=generator))]


def generator_for(seed: int, *what: object) -> torch.Generator:
    """A CPU generator that depends on the seed and on what it is for, and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
