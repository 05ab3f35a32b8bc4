"""Random gates: dropout in rank space, drawn anew in every training step.

gate' = gate · keep        keep of a row is 0, or 1 / (1 - p), so that its mean is 1

token    each row at each token       dropout on the hidden activations, Hu et al. 2021, arXiv 2106.09685
rank     each row for each picture    kohya's and LyCORIS' `rank_dropout`
module   all rows of a layer          their `module_dropout`, which does not divide by 1 - p; neither is done here
nested   all rows from a b-th on      DyLoRA, Valipour et al. 2022, arXiv 2210.07558, algorithm 1: b is drawn from
                                      1 … rank, so that the first b rows are an adapter of rank b for every b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError


@dataclass(frozen=True)
class Dropping:
    """Probabilities, each at least 0 and below 1, and whether the rows are trained nested."""

    token: float = 0.0
    rank: float = 0.0
    module: float = 0.0
    nested: bool = False

    def __post_init__(self) -> None:
        for name in ("token", "rank", "module"):
            if not 0 <= (chance := getattr(self, name)) < 1:
                raise ConfigError(f"{name} dropout is {chance}, expected at least 0 and below 1")

    @property
    def by_row(self) -> bool:
        """Whether anything in it needs a rank axis."""
        return bool(self.token or self.rank or self.nested)

    def rows(self, gate: Tensor, batch: int, tokens: Sequence[int]) -> Tensor:
        """`gate` (…, R) for the rows of a pair, over `batch` pictures of `tokens` places each."""
        size, device = gate.shape[-1], gate.device
        if self.token:
            gate = gate * _keep(self.token, (batch, *tokens, size), device)
        if self.rank:
            gate = gate * _keep(self.rank, (batch, *(1 for _ in tokens), size), device)
        if self.nested:
            gate = gate * (torch.arange(size, device=device) <= torch.randint(size, (), device=device))
        return gate * self.whole(device)

    def whole(self, device: torch.device) -> Tensor:
        """0 where the layer's adapter is left out in this step, else 1."""
        return (torch.rand((), device=device) >= self.module).float() if self.module else torch.ones((), device=device)


def _keep(chance: float, shape: Sequence[int], device: torch.device) -> Tensor:
    return (torch.rand(*shape, device=device) >= chance) / (1 - chance)
