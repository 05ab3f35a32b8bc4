"""Branches that change the weight by a matrix ΔW, and the magnitude that may stand beside any of them.

    adapted = (W + ΔW) x                                         without a magnitude
    adapted = c · (W + ΔW) x      c = m / ‖W + ΔW‖ by row        DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5
    adapted = (W + ΔW) (c · x)    c = m / ‖W + ΔW‖ by column     the same with one magnitude an input

`diff_b` (out,), a change of the bias, is added to either; no magnitude multiplies it. As in section 4.3 there, no
gradient goes through the norm. Where nothing is trained, c is computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.branches import Branch, by_channel, convolved, product, without_bias
from lora_diffusion.quantize import dequantize


class DeltaBranch(Branch):
    """ΔW rebuilt for the call from few numbers; in training once more for the backward pass, not kept for it."""

    def delta(self, layer: nn.Module) -> Tensor:
        """ΔW at weight 1, in the shape of the layer's weight; float32 where it is trained."""
        raise NotImplementedError(type(self).__name__)

    def delta_product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """ΔW x with the layer's geometry."""

        def rebuilt(x: Tensor) -> Tensor:
            return convolved(layer, x, self.delta(layer).to(x.dtype))

        if not torch.is_grad_enabled():
            return rebuilt(x)
        again: Tensor = checkpoint(rebuilt, x, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportAssignmentType]
        return again

    def norm(self, layer: nn.Module, *, by_input: bool) -> Tensor:
        """‖W + ΔW‖ of each row, or of each column: one number an output or an input, float32."""
        return weight_norm(dequantize(layer) + self.delta(layer).float(), by_input=by_input)

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """(adapted - base) of the formulas above."""
        change = self._of_weight(layer, x, out)
        if "diff_b" not in self.held:
            return change
        return change + by_channel(layer, self.held["diff_b"]).to(change.dtype)

    def _of_weight(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        if "magnitude" not in self.held:
            return self.delta_product(layer, x)
        base = without_bias(layer, out)
        c = by_channel(layer, self.constant(lambda: self._ratio(layer)))
        if self.held["magnitude"].dim() == 1:
            return (c - 1).to(out.dtype) * base + c.to(out.dtype) * self.delta_product(layer, x)
        x = x * c.to(x.dtype)
        return product(layer, x) - base + self.delta_product(layer, x)

    def _ratio(self, layer: nn.Module) -> Tensor:
        magnitude = self.held["magnitude"].float()
        with torch.no_grad():
            norm = self.norm(layer, by_input=magnitude.dim() > 1)
        return magnitude.reshape(-1) / norm.clamp_min(torch.finfo(torch.float32).tiny)


def weight_norm(weight: Tensor, *, by_input: bool) -> Tensor:
    """Euclidean norm of each output's numbers, or of each input's."""
    return squares(weight.transpose(0, 1) if by_input else weight).sqrt()


def squares(weight: Tensor) -> Tensor:
    """Sum of squares over all but the first axis."""
    return weight.flatten(1).square().sum(dim=1)


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor | None) -> Tensor:
    """The dense change: ΔW, or with a magnitude m · (W + ΔW) / ‖W + ΔW‖ - W."""
    if magnitude is None:
        return delta
    changed, by_input = weight + delta, magnitude.dim() > 1
    c = magnitude.float().reshape(-1).to(weight.device) / weight_norm(changed, by_input=by_input)
    shape = [1] * weight.dim()
    shape[1 if by_input else 0] = -1
    return changed * c.reshape(shape) - weight
