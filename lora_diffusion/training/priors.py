"""Prior preservation: what the base knows of a class of things stays, while one of them is learned.

pictures   a second loss over pictures of the class, which the base draws itself where there are none
           (DreamBooth: Ruiz et al. 2022, arXiv 2208.12242, section 3.3)
teacher    a second loss over the training pictures under captions that name the class in place of the trigger,
           towards what the base predicts there: the slots at weight 0, in the same process. No class pictures.
           (ai-toolkit's "differential output preservation")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.data.cache import content_key
from lora_diffusion.families import Family
from lora_diffusion.pipelines import Opened
from lora_diffusion.quantize import fingerprint
from lora_diffusion.training.config import TrainConfig

Count = Callable[[int, int], None]  # done, total


def class_folder(config: TrainConfig, opened: Opened, family: Family, listen: Count) -> Path:
    """The folder of class pictures; those of `prior.subject` are drawn by the base where there is none.

    Each has its number as its seed and is written whole or not at all, so an interrupted drawing goes on.
    """
    prior = config.prior
    if prior.folder is not None:
        return prior.folder
    size = config.data.resolution
    made_of = {"base": fingerprint(getattr(opened.pipe, family.denoiser)), "dtype": str(opened.dtype), "size": size}
    key = content_key(subject=prior.subject, steps=prior.steps, guidance=prior.guidance, **made_of)
    folder = config.output / "class-pictures" / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(prior.pictures):
        path = folder / f"{number:04d}.png"
        if not path.exists():
            draft = folder / f".{path.stem}.{os.getpid()}.png"
            _draw(opened.pipe, config, number).save(draft)
            draft.replace(path)
        listen(number + 1, prior.pictures)
    return folder


def _draw(pipe: Any, config: TrainConfig, seed: int) -> Any:
    prior, size = config.prior, config.data.resolution
    with torch.inference_mode():
        (picture,) = pipe(
            prior.subject,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=prior.steps,
            guidance_scale=prior.guidance,
            width=size,
            height=size,
        ).images
    return picture
