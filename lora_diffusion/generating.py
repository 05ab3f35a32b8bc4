"""Drawing pictures: one seed a picture, the same picture whatever the batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_diffusion.stack import AdapterStack

RECIPE = "lora_diffusion"  # the PNG text chunk that says how a picture was made


@dataclass(frozen=True)
class Drawing:
    """How to draw. `size` in pixels (None: the pipeline's own); `extra` goes to the pipeline as it is."""

    steps: int = 30
    guidance: float = 5.0
    size: tuple[int, int] | None = None  # width, height
    negative: str | None = None
    batch: int = 8
    extra: dict[str, Any] = field(default_factory=dict)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Drawing = Drawing(),
    listen: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """One picture for each (prompt, seed). `listen` hears how many are done after each batch."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), how.batch):
        batch = list(prompts[start : start + how.batch])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + how.batch]]
        with torch.inference_mode():
            pictures += pipe(batch, generator=generators, **_arguments(how, len(batch))).images
        listen(len(pictures))
    return pictures


def _arguments(how: Drawing, count: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_inference_steps": how.steps, "guidance_scale": how.guidance, **how.extra}
    if how.size is not None:
        arguments |= {"width": how.size[0], "height": how.size[1]}
    if how.negative is not None:
        arguments["negative_prompt"] = [how.negative] * count
    return arguments


def recipe(
    prompt: str, seed: int, how: Drawing, base: str, precision: str | None, stack: AdapterStack
) -> dict[str, Any]:
    """How a picture was made, as JSON can say it; adapters by content hash."""
    adapters = [
        {"name": name, "sha256": stack[name].content_hash, "weight": weight} for name, weight in stack.weights.items()
    ]
    drawing = {"steps": how.steps, "guidance": how.guidance, "size": how.size, "negative": how.negative}
    return {"prompt": prompt, "seed": seed, "base": base, "precision": precision, **drawing, "adapters": adapters}


def save_picture(picture: Image.Image, path: Path, made: dict[str, Any]) -> None:
    """Write a PNG that carries its recipe."""
    info = PngInfo()
    info.add_text(RECIPE, json.dumps(made, ensure_ascii=False, default=dict))
    picture.save(path, pnginfo=info)
