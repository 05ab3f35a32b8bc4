"""OFT and BOFT as LyCORIS have them: the output's channels turned by an orthogonal matrix, W' = Rᵀ W; and PEFT's OFT.

    R = (I + Q)(I - Q)⁻¹,  Q = blocks - blocksᵀ      Cayley; R - I = 2 Q (I - Q)⁻¹, exactly 0 at the start
    OFT    `blocks` (n, b, b): R is block-diagonal, n · b = out              Qiu et al. 2023, arXiv 2306.07280
    BOFT   `blocks` (m, n, b, b): m such turns, each across another stride   Liu et al. 2023, arXiv 2311.06243

`rescale` (out, 1[, 1, 1]) multiplies the turned outputs. `alpha` is no scale: where it is above 0 it bounds the
length of Q by alpha · out, or by alpha for BOFT's stages together as LyCORIS' functional form has it.
LyCORIS turns by Rᵀ in OFT and by R in BOFT; so do we. LyCORIS of 2023 has the blocks of R itself, `diag` (n, b, b).

PEFT and OneTrainer turn the inputs of a linear layer, W' = W Rᵀ, by the upper triangles of Q, row by row, `R`
(n, b · (b - 1) / 2), n · b = in or n = 1 for one block everywhere, with R = I + 2Q + 2Q² + 2Q³ + Q⁴ for Cayley's.
Where OneTrainer's mark `scaled` stands beside them, whatever it holds, Q is divided by 2 √(b - 1).
Files with `diag` or `R` are read, stacked and written; new layers have `blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, by_channel, product, without_bias
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import CONVOLUTIONS, is_convolution, is_linear, out_width, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.lokr import factorization
from lora_diffusion.quantize import dequantize


def turn_less_one(blocks: Tensor, bound: float) -> Tensor:
    """R - I of every block, float32."""
    blocks = blocks.float()
    q = blocks - blocks.transpose(-1, -2)
    if bound > 0:
        q = q * (bound / (q.norm() + 1e-8)).clamp(max=1.0)
    one = torch.eye(q.shape[-1], device=q.device)
    return 2 * torch.linalg.solve(one - q, q, left=False)


def input_turn_less_one(tensors: Mapping[str, Tensor] | nn.ParameterDict) -> Tensor:
    """R - I of every block of inputs, float32 (n, b, b), from PEFT's `R` (n, b · (b - 1) / 2)."""
    triangles = tensors["R"].float()
    size = _side(triangles.shape[-1])
    if "scaled" in tensors:
        triangles = triangles / (2 * math.sqrt(size - 1))
    q = torch.zeros(len(triangles), size, size, device=triangles.device)
    q[:, *torch.triu_indices(size, size, 1)] = triangles
    q = q - q.transpose(-1, -2)
    square = q @ q
    return 2 * (q + square + square @ q) + square @ square


def inputs_turned(x: Tensor, less_one: Tensor) -> Tensor:
    """x (…, in) times R - I, in its dtype."""
    blocks = x.unflatten(-1, (-1, less_one.shape[-1]))
    turns = less_one.to(x.dtype).expand(blocks.shape[-2], -1, -1)
    return torch.einsum("...rk,rkc->...rc", blocks, turns).flatten(-2)


def _side(numbers: int) -> int:
    """Of the matrix above whose diagonal are so many numbers; 0 where there is none."""
    side = (1 + math.isqrt(1 + 8 * numbers)) // 2
    return side if side * (side - 1) // 2 == numbers else 0


def turned(rows: Tensor, less_one: Tensor) -> Tensor:
    """(turn - I) applied along the last axis of `rows` (…, out), in its dtype."""
    less_one = less_one.to(rows.dtype)
    if less_one.dim() == 3:
        blocks = rows.unflatten(-1, less_one.shape[:2])
        return torch.einsum("knm,...kn->...km", less_one, blocks).flatten(-2)
    now, size = rows, less_one.shape[-1]
    for stage, block in enumerate(less_one):
        stride = 2**stage * (size // 2)
        there = now.unflatten(-1, (-1, 2, stride)).transpose(-2, -1).flatten(-3).unflatten(-1, (-1, size))
        there = there + torch.einsum("bij,...bj->...bi", block, there)
        now = there.flatten(-2).unflatten(-1, (-1, stride, 2)).transpose(-2, -1).flatten(-3)
    return now - rows


class OFTBranch(Branch):
    """(rescale · turn - I) W x."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Needs the base output alone."""
        base = without_bias(layer, out)
        less_one = self.constant(lambda: _less_one(self.held, self.scale))
        if isinstance(layer, CONVOLUTIONS):
            change = turned(base.movedim(1, -1), less_one).movedim(-1, 1)
        else:
            change = turned(base, less_one)
        if "rescale" not in self.held:
            return change
        factor = by_channel(layer, self.held["rescale"]).to(out.dtype)
        return factor * change + (factor - 1) * base


class InputTurnBranch(Branch):
    """W (R - I) x."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """One more product of the frozen layer."""
        return product(layer, inputs_turned(x, self.constant(lambda: input_turn_less_one(self.held))))


@dataclass(frozen=True)
class OFT:
    """Settings of new layers: `rank` is the largest block, `alpha` the bound (None or 0: none), `rescale` or not.

    `stages` > 0 makes it BOFT with at most so many; the output's width must then be a power of two times
    an even block.
    """

    rank: int = 16
    alpha: float | None = None
    rescale: bool = False
    stages: int = 0

    name: ClassVar[str] = "oft"
    tensors: ClassVar[Mapping[str, bool]] = dict.fromkeys(("blocks", "diag", "R", "scaled", "rescale"), False)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.stages < 0 or not math.isfinite(self.alpha or 0.0):
            raise ConfigError(f"oft: {self}, expected rank >= 1, stages >= 0 and a finite alpha")

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Linear layers of any precision and one-group convolutions."""
        return is_linear(layer) or is_convolution(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """Zeros, and ones to rescale."""
        shape = weight_shape(layer)
        size, count = factorization(shape[0], self.rank) if not self.stages else _butterfly(shape[0], self.rank)
        blocks = torch.zeros(count, size, size)
        if self.stages:
            blocks = blocks.repeat(min(self.stages, (count - 1).bit_count() + 1), 1, 1, 1)
        tensors = {"blocks": blocks}
        if self.rescale:
            tensors["rescale"] = torch.ones(shape[0], *(1 for _ in shape[1:]))
        return LayerAdapter(self.name, tensors, float(self.alpha or 0.0), "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where the blocks tile the output, or PEFT's the inputs of a linear layer."""
        there, width = adapter.tensors, out_width(layer)
        if sum(part in there for part in ("blocks", "diag", "R")) != 1:
            return f"its tensors are {', '.join(there)}; expected one of blocks, diag and R"
        if "R" in there:
            return _misfit_of_inputs(adapter, layer)
        if "scaled" in there:
            return "scaled is a mark beside R, which is not there"
        blocks, rescale = there["blocks" if "blocks" in there else "diag"], there.get("rescale")
        if "diag" in there and blocks.dim() != 3:
            return f"diag {tuple(blocks.shape)}; expected (n, b, b)"
        if rescale is not None and rescale.numel() != width:
            return f"rescale {tuple(rescale.shape)}; expected ({width}, 1)"
        square = blocks.dim() in (3, 4) and blocks.shape[-1] == blocks.shape[-2]
        fits = square and blocks.shape[-3] * blocks.shape[-1] == width
        if fits and blocks.dim() == 4:
            fits = blocks.shape[-1] % 2 == 0 and width % (2 ** blocks.shape[0] * (blocks.shape[-1] // 2)) == 0
        if fits:
            return None
        return f"blocks {tuple(blocks.shape)}; expected (n, b, b) or (m, n, b, b) with n · b = {width}"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """1: alpha is a bound."""
        return 1.0

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        if "R" in adapter.tensors:
            return InputTurnBranch(name, adapter.tensors)
        return OFTBranch(name, adapter.tensors, _bound(adapter, layer))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """(rescale · turn - I) W, float32."""
        base = dequantize(layer)
        there = {part: tensor.to(base.device) for part, tensor in adapter.tensors.items()}
        if "R" in there:
            return inputs_turned(base, input_turn_less_one(there).transpose(-1, -2))
        less_one = _less_one(there, _bound(adapter, layer))
        change = turned(base.movedim(0, -1), less_one).movedim(-1, 0)
        rescale = adapter.tensors.get("rescale")
        if rescale is None:
            return change
        factor = rescale.float().reshape(-1, *(1 for _ in base.shape[1:])).to(base.device)
        return factor * change + (factor - 1) * base


def _less_one(tensors: Mapping[str, Tensor] | nn.ParameterDict, bound: float) -> Tensor:
    if "blocks" in tensors:
        return turn_less_one(tensors["blocks"], bound)
    return tensors["diag"].float() - torch.eye(tensors["diag"].shape[-1], device=tensors["diag"].device)


def _misfit_of_inputs(adapter: LayerAdapter, layer: nn.Module) -> str | None:
    triangles, shape = adapter.tensors["R"], weight_shape(layer)
    if len(shape) != 2 or "rescale" in adapter.tensors:
        return "PEFT's OFT, which turns inputs, is for linear layers and without rescale here"
    side = _side(triangles.shape[-1]) if triangles.dim() == 2 else 0
    if side > 1 and (len(triangles) * side == shape[1] or (len(triangles) == 1 and shape[1] % side == 0)):
        return None
    return f"R {tuple(triangles.shape)}; expected (n, b · (b - 1) / 2) with n · b = {shape[1]}"


def _bound(adapter: LayerAdapter, layer: nn.Module) -> float:
    return (adapter.alpha or 0.0) * out_width(layer)


def _butterfly(width: int, largest: int) -> tuple[int, int]:
    """(block size, count): the largest even block up to `largest` that occurs a power of two times."""
    for size in range(largest - largest % 2, 1, -2):
        if width % size == 0 and (width // size).bit_count() == 1:
            return size, width // size
    raise ConfigError(f"oft: {width} outputs are no power of two times an even block of at most {largest}")
