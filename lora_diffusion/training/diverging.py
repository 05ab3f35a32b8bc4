"""A run whose loss or gradients are no numbers any more: what is still good of it, kept as a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_diffusion.errors import some
from lora_diffusion.training.checkpoints import find_checkpoints, load_checkpoint
from lora_diffusion.training.finishing import save_state
from lora_diffusion.training.results import DivergedError

if TYPE_CHECKING:
    from lora_diffusion.training.loop import Run


def diverged(run: Run, loss: float, norm: float, names: list[str]) -> DivergedError:
    """The error of a step that cannot be made, which names it, its pictures and the last good state's file."""
    at = f"step {run.step + 1} (pictures {some(names, len(names))}): loss {loss}, gradient norm {norm}"
    kept = _keep_good(run)
    if kept is None:
        return DivergedError(f"{at}; nothing good was learned before; look at these pictures, or try a lower train.lr")
    return DivergedError(
        f"{at}; {kept} is the last good state: look at these pictures, or go on from it with adapter.init_from,"
        " a lower train.lr and another output"
    )


def _keep_good(run: Run) -> Path | None:
    """Write the newest state under which earlier pictures have a loss: the present one or a checkpoint's."""
    if run.step and _has_a_loss(run):
        return save_state(run, f"{run.config.name}-step-{run.step:06d}")
    for path in reversed(find_checkpoints(run.checkpoints)):
        checkpoint = load_checkpoint(path)
        run.step = checkpoint.step
        run.trained.restore(checkpoint.parameters)
        if _has_a_loss(run):
            return save_state(run, f"{run.config.name}-{path.name}")
    return None


@torch.no_grad()
def _has_a_loss(run: Run) -> bool:
    """Whether the pictures of the step before have one now."""
    index = (run.step - 1) * run.processes.count * run.config.train.accumulate
    return all(math.isfinite(part.item()) for part in run.judge.parts(run.data.draw(index), index))
