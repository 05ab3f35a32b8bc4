"""Lumina Image 2: a flow-matching transformer on Gemma 2, whose time runs from noise to picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import instead_of_empty, picture_latents


class Lumina2:
    """Lumina Image 2.0 and models built the same way."""

    name = "lumina2"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over a Lumina2Transformer2DModel."""
        return has_denoiser(pipe, "Lumina2Transformer2DModel")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, 256, width), "mask": (n, 256)}; no prompt goes without the system prompt."""
        states, mask, no_states, no_mask = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
        return instead_of_empty(prompts, states=(states, no_states), mask=(mask, no_mask))

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """(mode - shift_factor) * scaling_factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the transformer is told 1 - sigma and answers latents - noise."""
        return -denoiser(
            hidden_states=noisy,
            timestep=1 - time,
            encoder_hidden_states=conditioning["states"],
            encoder_attention_mask=conditioning["mask"].long(),
        ).sample


LUMINA2 = Lumina2()
