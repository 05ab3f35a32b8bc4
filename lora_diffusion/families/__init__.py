"""SEAM 3: model families. One file a family: its components, and how it turns prompts and pictures into what
the denoiser takes.

A family knows its Diffusers pipeline and nothing of files. It says what kind of process it is ("diffusion":
noise schedules with epsilon or v targets, "flow": straight paths); the objective does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from lora_diffusion.errors import TargetError, some
from lora_diffusion.registry import Registry

Process = Literal["diffusion", "flow"]
Conditioning = Mapping[str, Tensor]  # name -> (batch, …): whatever the denoiser needs besides noisy latents


class Family(Protocol):
    """One model family."""

    name: str
    process: Process
    denoiser: str  # component name
    text_encoders: tuple[str, ...]
    kept: tuple[str, ...]  # globs of denoiser layers that stay in 16 bits besides embedders and output projections
    sized: bool  # the denoiser is told sizes and crop: conditioning has "time_ids" (n, 6), as in `data.buckets.View`

    def matches(self, pipe: Any) -> bool:
        """Whether a Diffusers pipeline is of this family."""
        ...

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning for each prompt, every tensor (len(prompts), …)."""
        ...

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """(n, 3, height, width) in [-1, 1] -> latents as the denoiser sees them, (n, channels, h, w)."""
        ...

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's answer, (n, channels, h, w), at `time` (n,): timesteps, or sigma in [0, 1] for flow."""
        ...


FAMILIES: Registry[Family] = Registry(
    "families",
    {
        "sd": "lora_diffusion.families.sd:SD",
        "sdxl": "lora_diffusion.families.sdxl:SDXL",
        "sd3": "lora_diffusion.families.sd3:SD3",
        "flux": "lora_diffusion.families.flux:FLUX",
        "flux2": "lora_diffusion.families.flux2:FLUX2",
        "z-image": "lora_diffusion.families.z_image:Z_IMAGE",
        "qwen-image": "lora_diffusion.families.qwen_image:QWEN_IMAGE",
        "chroma": "lora_diffusion.families.chroma:CHROMA",
        "lumina2": "lora_diffusion.families.lumina2:LUMINA2",
        "sana": "lora_diffusion.families.sana:SANA",
        "pixart-sigma": "lora_diffusion.families.pixart:PIXART",
    },
)


def has_denoiser(pipe: Any, name: str) -> bool:
    """Whether the pipeline's transformer is of the class called `name`."""
    return type(getattr(pipe, "transformer", None)).__name__ == name


def family_of(pipe: Any) -> Family:
    """The family of a pipeline. TargetError where none knows it."""
    for family in FAMILIES.values():
        if family.matches(pipe):
            return family
    raise TargetError(
        f"{type(pipe).__name__} is of no family that can be trained; there are {some(list(FAMILIES), 20)}"
    )
