"""The low-rank pair: what one adapter adds to one layer, and its rows as a slot has them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diffusion.packing import Block


@dataclass(frozen=True)
class Pair:
    """One adapter's low-rank pair on one layer: `down` (rank, in[, kh, kw]), `up` (out, rank[, 1, 1])."""

    name: str
    down: Tensor
    up: Tensor
    scale: float
    token: object = field(default_factory=object, repr=False, compare=False)  # whose rows these are in a slot
    laid: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # rows as a slot has them

    @functools.cached_property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @functools.cached_property
    def block(self) -> Block:
        """What a slot notes of its rows."""
        return (self.token, self.rank)

    @functools.cached_property
    def entry(self) -> tuple[str, int, float]:
        """What a slot says of it: name, rank and scale."""
        return (self.name, self.rank, self.scale)

    def rows(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """`down` (rank, …) as it is or `up` as (rank, out). With a dtype in that, laid out once and kept."""
        laid = self.laid.get(name)
        if dtype is not None and laid is not None and laid.dtype == dtype:
            return laid
        rows = self.down if name == "down" else self.up.reshape(-1, self.rank).t()
        if dtype is not None:
            with torch.inference_mode(mode=False):  # it is read outside of one as well
                rows = self.laid[name] = rows.detach().to(dtype).contiguous()
        return rows
