"""Z-Image: a flow-matching transformer on Qwen3, whose time runs from noise to picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import padded, picture_latents

TOKENS = 512  # what the pipeline cuts prompts at


class ZImage:
    """Z-Image base and turbo."""

    name = "z-image"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over a ZImageTransformer2DModel."""
        return has_denoiser(pipe, "ZImageTransformer2DModel")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, 512, width), "mask": (n, 512)}"""
        states, _ = pipe.encode_prompt(
            list(prompts),  # the pipeline writes its chat template into the list
            pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
        )
        return padded(states, TOKENS)

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """(mode - shift_factor) * scaling_factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the transformer is told 1 - sigma and answers latents - noise."""
        lengths = conditioning["mask"].bool().sum(1).tolist()
        states = [row[:length] for row, length in zip(conditioning["states"], lengths, strict=True)]
        answer: list[Tensor] = denoiser(list(noisy[:, :, None]), 1 - time, states).sample
        return -torch.stack(answer)[:, :, 0]


Z_IMAGE = ZImage()
