"""Prior preservation: what the base knows of a class of things stays, while one of them is learned.

pictures   a second loss over pictures of the class, which the base draws itself where there are none
           (DreamBooth: Ruiz et al. 2022, arXiv 2208.12242, section 3.3)
teacher    a second loss over the training pictures under captions that name the class in place of the trigger,
           towards what the base predicts there: the slots at weight 0, in the same process. No class pictures.
           (ai-toolkit's "differential output preservation")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_diffusion.data.cache import content_key
from lora_diffusion.families import Family
from lora_diffusion.pipelines import Opened, draw_one
from lora_diffusion.quantize import fingerprint
from lora_diffusion.sheet import write_picture
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
    parts = {name: getattr(opened.pipe, name, None) for name in (family.denoiser, "vae", *family.text_encoders)}
    base = {name: fingerprint(part) for name, part in parts.items() if part is not None}
    made_of = {"base": base, "dtype": str(opened.dtype), "size": size}
    key = content_key(subject=prior.subject, steps=prior.steps, guidance=prior.guidance, **made_of)
    folder = config.output / "class-pictures" / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(prior.pictures):
        path = folder / f"{number:04d}.png"
        if not path.exists():
            pipe, steps, guidance = opened.pipe, prior.steps, prior.guidance
            write_picture(draw_one(pipe, prior.subject, number, steps=steps, guidance=guidance, side=size), path)
        listen(number + 1, prior.pictures)
    return folder
