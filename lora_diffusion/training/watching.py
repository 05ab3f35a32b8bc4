"""What can be seen of a run while it goes on: pictures with fixed seeds, and the best state by held-out loss.

    OUTPUT/previews/step-000200.png    a row for each prompt, a column for each seed
    OUTPUT/previews/weights.png        at the end: a column for each weight of the adapter
    OUTPUT/NAME-best.safetensors       as it was where the held-out loss was lowest

Pictures are drawn by the base's own pipeline, for which VAE and text encoders wait in the host's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_diffusion.pipelines import draw_one, present
from lora_diffusion.sheet import contact_sheet, write_picture
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.trained import Trained


class Painter:
    """Draws `watch.prompts` with what is being trained at some weight."""

    def __init__(self, config: TrainConfig, pipe: Any, parts: Sequence[str], device: torch.device) -> None:
        self.config, self.pipe, self.device = config, pipe, device
        self.parts = present(pipe, parts)
        self.folder = config.output / "previews"

    def at_step(self, trained: Trained, step: int) -> Path:
        """Prompts by seeds, as the adapter is now."""
        watch = self.config.watch
        seeds = range(watch.seed, watch.seed + watch.pictures)
        rows = [[self._draw(prompt, seed) for seed in seeds] for prompt in self._ready(trained)]
        return self._save(trained, f"step-{step:06d}", rows, [f"seed {seed}" for seed in seeds], f"step {step}")

    def at_weights(self, trained: Trained) -> Path:
        """Prompts by weights, from the base (0) on."""
        watch, columns = self.config.watch, list[list[Image.Image]]()
        prompts = self._ready(trained)
        for weight in watch.weights:
            trained.weigh(weight)
            columns.append([self._draw(prompt, watch.seed) for prompt in prompts])
        trained.weigh(1.0)
        rows = [list(row) for row in zip(*columns, strict=True)]
        return self._save(trained, "weights", rows, [f"weight {weight:g}" for weight in watch.weights], "")

    def _ready(self, trained: Trained) -> list[str]:
        trained.training(False)
        for name in self.parts:
            getattr(self.pipe, name).to(self.device)
        return self.config.watch.prompts

    def _save(self, trained: Trained, name: str, rows: list[list[Image.Image]], columns: list[str], more: str) -> Path:
        trained.training(True)
        park(self.pipe, self.parts)
        self.folder.mkdir(parents=True, exist_ok=True)
        title = f"{self.config.name}, {more}" if more else self.config.name
        path = self.folder / f"{name}.png"
        write_picture(contact_sheet(rows, self.config.watch.prompts, columns, title=title), path)
        return path

    def _draw(self, prompt: str, seed: int) -> Image.Image:
        watch = self.config.watch
        side = watch.size or self.config.data.resolution
        return draw_one(self.pipe, prompt, seed, steps=watch.steps, guidance=watch.guidance, side=side)


def park(pipe: Any, parts: Sequence[str]) -> None:
    """Let these components wait on the host."""
    for name in parts:
        getattr(pipe, name).to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
