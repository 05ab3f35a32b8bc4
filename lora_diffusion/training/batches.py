"""Cached latents and text embeddings in memory, and which of them make up which batch.

Everything random is a function of (seed, step, part): the same step draws the same pictures, captions, noise
and times on any machine layout and after any interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Item:
    """One picture ready for the denoiser: its latents (channels, h, w) and the rows of its captions."""

    name: str
    latents: Tensor
    captions: tuple[int, ...]  # rows of the conditioning table; row 0 is the empty caption
    share: float = 1.0  # how often it is seen in an epoch
    mask: Tensor | None = None  # (h, w) in [0, 1], where the loss counts; None: everywhere
    conditioning: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # of the picture, not its caption
    plain: tuple[int, ...] = ()  # rows of the same captions with the class in place of the trigger


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape: latents (n, channels, h, w), conditioning (n, …), where they came from."""

    latents: Tensor
    conditioning: dict[str, Tensor]
    names: tuple[str, ...]
    masks: Tensor | None = None  # (n, 1, h, w) in [0, 1]
    plain: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # conditioning of the class, as a teacher hears
    texts: tuple[str, ...] = ()  # the captions themselves, where the batches know them
    plain_texts: tuple[str, ...] = ()


class Batches:
    """Draws batches from items; only pictures of the same shape go together."""

    def __init__(
        self,
        items: Sequence[Item],
        table: dict[str, Tensor],
        *,
        size: int,
        seed: int,
        dropout: float = 0.0,
        texts: Sequence[str] = (),
    ) -> None:
        self.texts = texts
        self.items, self.table, self.size, self.seed, self.dropout = list(items), table, size, seed, dropout
        self._drawn: tuple[int, list[list[int]]] = (0, self._epoch(0))
        self._length = len(self._drawn[1])

    def draw(self, index: int) -> Batch:
        """The batch number `index` (0, 1, …) of the whole run: epochs are shuffled, each picture by its share."""
        epoch, place = divmod(index, self._length)
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._epoch(epoch)
        return self._collate(self._drawn[1][place], generator_for(self.seed, "captions", index))

    def in_order(self) -> list[Batch]:
        """All items once, first captions, no dropout: to measure on."""
        groups = [group[i : i + self.size] for group in self._shapes() for i in range(0, len(group), self.size)]
        return [self._collate(group, None) for group in groups]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Batches of one epoch; every epoch has the same number of them."""
        generator = generator_for(self.seed, "epoch", epoch)
        batches: list[list[int]] = []
        for shape in self._shapes():
            group = self._by_share(shape, generator)
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            while len(order) % self.size:  # the last batch is filled from the front
                order += order[: self.size - len(order) % self.size]
            batches += [order[i : i + self.size] for i in range(0, len(order), self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _by_share(self, group: list[int], generator: torch.Generator) -> list[int]:
        """Each index as often as its share says; the broken rests of the shares are drawn, as many every time."""
        shares = torch.tensor([self.items[i].share for i in group], dtype=torch.float64)
        counts, rest = shares.floor().long(), shares.frac()
        extra = round(rest.sum().item()) or int(not counts.any())
        if extra:
            counts[torch.multinomial(rest, extra, replacement=False, generator=generator)] += 1
        return [i for i, count in zip(group, counts.tolist(), strict=True) for _ in range(count)]

    def _shapes(self) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(self.items):
            groups.setdefault(tuple(item.latents.shape), []).append(index)
        return list(groups.values())

    def _collate(self, chosen: list[int], generator: torch.Generator | None) -> Batch:
        items = [self.items[i] for i in chosen]
        said = [self._caption(item, generator) for item in items]
        rows = [_row(item.captions, one) for item, one in zip(items, said, strict=True)]
        plain_rows = [_row(item.plain, one) for item, one in zip(items, said, strict=True) if item.plain]
        plain = self._conditioning(items, plain_rows) if len(plain_rows) == len(items) else {}
        masks = None
        if any(item.mask is not None for item in items):
            whole = torch.ones(items[0].latents.shape[-2:])
            masks = torch.stack([whole if item.mask is None else item.mask for item in items])[:, None]
        latents = torch.stack([item.latents for item in items])
        names, texts = tuple(item.name for item in items), self._said(rows)
        return Batch(latents, self._conditioning(items, rows), names, masks, plain, texts, self._said(plain_rows))

    def _said(self, rows: list[int]) -> tuple[str, ...]:
        return tuple(self.texts[row] for row in rows) if self.texts else ()

    def _conditioning(self, items: list[Item], rows: list[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(rows)
        conditioning = {name: values[chosen] for name, values in self.table.items()}
        for name in items[0].conditioning:
            conditioning[name] = torch.stack([item.conditioning[name] for item in items])
        return conditioning

    def _caption(self, item: Item, generator: torch.Generator | None) -> int | None:
        """Which of its captions a picture has this time; None: the empty one."""
        if generator is None:
            return 0
        if torch.rand((), generator=generator).item() < self.dropout:
            return None
        return int(torch.randint(len(item.captions), (), generator=generator))


def _row(captions: tuple[int, ...], chosen: int | None) -> int:
    return 0 if chosen is None else captions[chosen]


def generator_for(seed: int, *what: object) -> torch.Generator:
    """A CPU generator that depends on the seed and on what it is for, and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
