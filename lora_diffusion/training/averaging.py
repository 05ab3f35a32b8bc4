"""The exponential moving average of what is trained, by the steps of Diffusers' `EMAModel`.

    a ← a - (1 - d) (a - p) after update n = 1, 2, …        d = 0 at n = 1, then min(decay, n / (n + 9))

So the average begins at the first trained state and not at the fresh one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_diffusion.attachment import Attachment
from lora_diffusion.errors import LoraDiffusionError
from lora_diffusion.training.trained import Trained


class Average:
    """Average tensors of the trainable parameters of an attachment, by their names."""

    def __init__(self, attachment: Attachment | Trained, decay: float) -> None:
        self.attachment, self.decay = attachment, decay
        self.tensors = {name: p.detach().clone() for name, p in attachment.named_parameters()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the parameters after optimiser step `count` (1, 2, …)."""
        rest = 1 - (min(self.decay, count / (count + 9)) if count > 1 else 0.0)
        for name, parameter in self.attachment.named_parameters():
            average = self.tensors[name]
            average.sub_(rest * (average - parameter))

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's average."""
        if missing := self.tensors.keys() - tensors.keys():
            raise LoraDiffusionError(f"the checkpoint has no average of {min(missing)}; remove it to start again")
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @torch.no_grad()
    def put_in(self, cap: float | None) -> None:
        """Write the average into the parameters; `cap` bounds its deltas as in training."""
        for name, parameter in self.attachment.named_parameters():
            parameter.copy_(self.tensors[name])
        if cap is not None:
            self.attachment.cap(cap)
        if self.attachment.course:
            self.attachment.course.enforce()
