"""Sana: a flow-matching transformer with linear attention over latents 32 times smaller, on Gemma 2."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import instead_of_empty, picture_latents


class SanaImage:
    """Sana 0.6B to 4.8B; the instruction in front of a prompt is the pipeline's own default."""

    name = "sana"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """The text-to-image pipeline: Sana Sprint is another process."""
        return has_denoiser(pipe, "SanaTransformer2DModel") and type(pipe).__name__ == "SanaPipeline"

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, 300, width), "mask": (n, 300)}; no prompt goes without the instruction."""
        instruction = signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        states, mask, no_states, no_mask = pipe.encode_prompt(
            prompts, device=pipe.text_encoder.device, complex_human_instruction=instruction
        )
        return instead_of_empty(prompts, states=(states, no_states), mask=(mask, no_mask))

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """The autoencoder's latents (there is no posterior), scaled."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the transformer counts to 1,000 · timestep_scale and answers noise - latents."""
        config: Any = denoiser.config
        return denoiser(
            noisy,
            encoder_hidden_states=conditioning["states"],
            encoder_attention_mask=conditioning["mask"],
            timestep=time * 1000 * config.timestep_scale,
        ).sample


SANA = SanaImage()
