"""One process or several under `accelerate launch`: who am I, and averages over all of us."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from lora_diffusion.pipelines import pick_device


class Processes:
    """The processes of a run. Each holds the whole backbone; only adapter gradients are exchanged."""

    def __init__(self, device: str) -> None:
        self.index, self.count = 0, 1
        self.device = pick_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=self.device.type == "cpu")
            self.index, self.count, self.device = state.process_index, state.num_processes, state.device

    def mean(self, number: float) -> float:
        """The average of a number over all processes."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item() / self.count

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its average over all processes (one exchange of one flat buffer)."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1 or not gradients:
            return
        buffer = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(buffer)
        parts = buffer.div_(self.count).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Let the others come as far."""
        if self.count > 1:
            torch.distributed.barrier()
