"""T-LoRA: ΔW(u) = s · (up diag(sigma) M(u) down - up₀ diag(sigma₀) M(u) down₀), fewer ranks the more noise u.

Soboleva et al. 2025, arXiv 2507.05964. It begins with singular parts (`down`, `up` orthogonal, `sigma` their values),
which are taken off again, so that fresh changes nothing. M(u) lets the first ranks through (`gates/fading.py`), in
training by each picture's own noise. Files hold a plain LoRA of twice the rank, row by row the trained and the first,
and in the metadata what fades when: elsewhere all ranks act at every step, here as they were trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import convolved, pointwise
from lora_diffusion.errors import ConfigError
from lora_diffusion.gates.fading import STEEPEST, Fading
from lora_diffusion.layers import CONVOLUTIONS, kernel_shape, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.deltas import DeltaBranch
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_shapes, on_host
from lora_diffusion.products import over_places
from lora_diffusion.quantize import dequantize

TRIPLE = ("down", "sigma", "up")
STARTS = tuple(f"start_{part}" for part in TRIPLE)


class TLoRABranch(DeltaBranch):
    """The three tensors and what they began as."""

    keep: Tensor | None = None  # M: (batch, rank) of 0 and 1; None: all ranks act

    def fade(self, fading: Fading, noise: Tensor) -> None:
        """Let the ranks act that do at each picture's `noise`, (batch,) in [0, 1]."""
        rank = self.held["sigma"].numel()
        active = torch.tensor([fading.ranks(rank, level) for level in noise.tolist()])
        self.keep = torch.arange(rank) < active[:, None]

    def delta(self, layer: nn.Module) -> Tensor:
        """The formula above at full rank."""
        return self.scale * _dense(dict(self.held.items()), layer)

    def delta_product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Both products by the same operations, so that equal tensors leave exactly 0."""
        return self.scale * (self._through(layer, x, TRIPLE) - self._through(layer, x, STARTS))

    def _through(self, layer: nn.Module, x: Tensor, names: tuple[str, ...]) -> Tensor:
        down, sigma, up = (self.held[name] for name in names)
        rows = (sigma.view(-1, 1) * down.flatten(1)).reshape(-1, *kernel_shape(layer))
        hidden = convolved(layer, x, rows.to(x.dtype))
        return pointwise(layer, hidden if self.keep is None else self._kept(layer, hidden, self.keep), up)

    def _kept(self, layer: nn.Module, hidden: Tensor, keep: Tensor) -> Tensor:
        if len(keep) != len(hidden):
            raise ConfigError(f"tlora: noise of {len(keep)} pictures for a layer that is given {len(hidden)} rows")
        keep, others = keep.to(hidden), (1,) * (hidden.dim() - 2)
        by_channel = over_places(keep, hidden) if isinstance(layer, CONVOLUTIONS) else keep.view(len(keep), *others, -1)
        return hidden * by_channel


@dataclass(frozen=True)
class TLoRA(Ranked):
    """Settings of new layers: as LoRA, and which ranks act when.

    `min_rank` act at pure noise (None: half of `rank`), all at none; `power` above 1 has fewer in between. `source` is
    the matrix whose singular parts it begins with, a random one or the frozen weight, `parts` which of them.
    """

    min_rank: int | None = None
    power: float = 1.0
    source: Literal["random", "weight"] = "random"
    parts: Literal["principal", "middle", "last"] = "last"

    name: ClassVar[str] = "tlora"
    tensors: ClassVar[Mapping[str, bool]] = dict.fromkeys(TRIPLE, True) | dict.fromkeys(STARTS, False)
    frozen: ClassVar[tuple[str, ...]] = STARTS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= (self.min_rank or 0) <= self.rank or not 0 < self.power < STEEPEST:
            raise ConfigError(
                f"tlora: min_rank {self.min_rank}, power {self.power}; expected 0 to {self.rank}, above 0 and below"
                f" {STEEPEST:g}"
            )

    @property
    def fading(self) -> Fading:
        """Of the ranks, each two rows in the file: the trained one and the first."""
        return Fading(self.rank // 2 if self.min_rank is None else self.min_rank, self.power, rows=2)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """Singular parts as the settings say; a random matrix is normal with deviation 1 / rank."""
        sides = _sides(layer)
        if self.rank > min(sides):
            raise ConfigError(f"tlora: rank {self.rank}: a matrix of {sides} has {min(sides)} singular parts only")
        random = self.source == "random"
        matrix = torch.randn(sides, generator=generator) / self.rank if random else dequantize(layer).flatten(1)
        tensors = _singular(matrix, layer, self.rank, self.parts)
        starts = {f"start_{part}": tensor.clone() for part, tensor in tensors.items()}
        return LayerAdapter(self.name, tensors | starts, self.stored_alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where both triples fit the layer, or one that is to begin with the layer's own singular parts."""
        rank, (out, *row) = adapter.tensors["down"].shape[0], weight_shape(layer)
        if (there := [name for name in STARTS if name in adapter.tensors]) and len(there) < len(STARTS):
            return f"{', '.join(there)} alone; expected {', '.join(STARTS)} or none of them"
        if not there and rank > min(_sides(layer)):
            return f"down of rank {rank}; expected at most {min(_sides(layer))} for a weight of {weight_shape(layer)}"
        shapes = {"down": (rank, *row), "sigma": (rank,), "up": (out, rank)}
        return check_shapes(adapter, layer, shapes | {f"start_{part}": shape for part, shape in shapes.items()})

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank."""
        return alpha_over(adapter, adapter.tensors["down"].shape[0])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return TLoRABranch(name, _with_starts(adapter.tensors, layer), cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """The formula above at full rank, float32."""
        return cls.scale(adapter) * _dense(_with_starts(adapter.tensors, layer), layer)

    @classmethod
    def written(cls, adapter: LayerAdapter, *, whole: bool = False) -> LayerAdapter | None:
        """A LoRA of twice the rank with the same scale: rows 0, 2, … as trained, 1, 3, … the start's, taken off."""
        rows, columns = list[Tensor](), list[Tensor]()
        for names, sign in ((TRIPLE, 1), (STARTS, -1)):
            down, sigma, up = (adapter.tensors[name] for name in names)
            rows.append(sigma.view(-1, *(1 for _ in down.shape[1:])) * down)
            columns.append(sign * up)
        tensors = {"down": torch.stack(rows, dim=1).flatten(0, 1), "up": torch.stack(columns, dim=2).flatten(1, 2)}
        alpha = None if adapter.alpha is None else 2 * adapter.alpha
        return LayerAdapter("lora", tensors, alpha, adapter.alpha_source)

    @classmethod
    def resumed(cls, written: LayerAdapter | None, fresh: LayerAdapter) -> LayerAdapter:
        """The reverse, with sigmas of 1; the start is the fresh layer's."""
        rank = len(fresh.tensors["sigma"])
        if written is None or written.method != "lora" or len(written.tensors["down"]) != 2 * rank:
            return written or fresh  # which does not fit, and is said to
        trained = {
            "down": written.tensors["down"][::2].contiguous(),
            "sigma": torch.ones(rank),
            "up": written.tensors["up"][:, ::2].contiguous(),
        }
        return LayerAdapter(cls.name, {**fresh.tensors, **trained}, fresh.alpha, fresh.alpha_source)


def _sides(layer: nn.Module) -> tuple[int, int]:
    out, *row = weight_shape(layer)
    return out, math.prod(row)


def _singular(matrix: Tensor, layer: nn.Module, rank: int, parts: str) -> dict[str, Tensor]:
    """`rank` singular parts of a matrix of the layer's sides, float32 on the CPU, in the shapes of a pair's factors."""
    row = weight_shape(layer)[1:]
    U, S, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    spare = len(S) - rank
    first = {"principal": 0, "middle": spare // 2, "last": spare}[parts]
    chosen = slice(first, first + rank)
    made = {"down": Vh[chosen].reshape(-1, *row), "sigma": S[chosen], "up": U[:, chosen]}
    made["up"] = made["up"].reshape(*made["up"].shape, *(1 for _ in row[1:]))
    return {part: on_host(tensor).clone().contiguous() for part, tensor in made.items()}


def _with_starts(tensors: Mapping[str, Tensor], layer: nn.Module) -> dict[str, Tensor]:
    """LyCORIS' files do not hold where they began: there it is the weight's own principal parts."""
    if STARTS[0] in tensors:
        return dict(tensors)
    starts = _singular(dequantize(layer).flatten(1), layer, len(tensors["down"]), "principal")
    return {**tensors, **{f"start_{part}": tensor.to(tensors["down"].device) for part, tensor in starts.items()}}


def _dense(tensors: Mapping[str, Tensor], layer: nn.Module) -> Tensor:
    first, second = (
        tensors[up].float().flatten(1) @ (tensors[sigma].float().view(-1, 1) * tensors[down].float().flatten(1))
        for down, sigma, up in (TRIPLE, STARTS)
    )
    return (first - second).reshape(weight_shape(layer))
