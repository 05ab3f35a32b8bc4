"""SDXL: one U-Net on two CLIP text encoders, told the size and crop of each picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process
from lora_diffusion.families.encoding import instead_of_empty, picture_latents


class StableDiffusionXL:
    """SDXL base and models built the same way, with epsilon or v prediction (Podell et al. 2023, arXiv 2307.01952)."""

    name = "sdxl"
    process: Process = "diffusion"
    denoiser = "unet"
    text_encoders = ("text_encoder", "text_encoder_2")
    kept: tuple[str, ...] = ()
    sized = True

    def matches(self, pipe: Any) -> bool:
        """A U-Net and two text encoders (the refiner has one)."""
        parts = ("unet", "text_encoder", "text_encoder_2")
        return all(getattr(pipe, name, None) is not None for name in parts)

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, tokens, width), "pooled": (n, width)}; no prompt is zeros where the pipeline says so."""
        states, no_states, pooled, no_pooled = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
        return instead_of_empty(prompts, states=(states, no_states), pooled=(pooled, no_pooled))

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """The VAE posterior's mode, scaled; in float32 where the VAE overflows in float16."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` are timesteps of the training schedule."""
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
        return denoiser(noisy, time, encoder_hidden_states=conditioning["states"], added_cond_kwargs=added).sample


SDXL = StableDiffusionXL()
