"""Learning rate over a run: warm-up, then constant, linear or cosine to 0."""

from __future__ import annotations

import math

from lora_diffusion.training.sections import LoopConfig


def rate(step: int, settings: LoopConfig) -> float:
    """Share of the learning rate at a step (0, 1, …)."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return shapes[settings.schedule]
