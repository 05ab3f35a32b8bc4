"""Stable Diffusion 1.x and 2.x: one U-Net with cross-attention on one CLIP text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process
from lora_diffusion.families.encoding import picture_latents


class StableDiffusion:
    """SD 1.x/2.x and models built the same way, with epsilon or v prediction."""

    name = "sd"
    process: Process = "diffusion"
    denoiser = "unet"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """A U-Net and exactly one text encoder."""
        return getattr(pipe, "unet", None) is not None and not hasattr(pipe, "text_encoder_2")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, tokens, width)}"""
        states, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, do_classifier_free_guidance=False)
        return {"states": states}

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """The VAE posterior's mode times its scaling factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` are timesteps of the training schedule."""
        return denoiser(noisy, time, encoder_hidden_states=conditioning["states"]).sample


SD = StableDiffusion()
