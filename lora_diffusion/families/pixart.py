"""PixArt-Σ: a transformer for noise prediction on T5, which also answers a variance that nobody uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import picture_latents


class PixArtSigma:
    """PixArt-Σ (Chen et al. 2024, arXiv 2403.04692), and PixArt-α where it takes no size conditions."""

    name = "pixart-sigma"
    process: Process = "diffusion"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over a PixArtTransformer2DModel that is not told resolution and aspect ratio."""
        return has_denoiser(pipe, "PixArtTransformer2DModel") and not pipe.transformer.use_additional_conditions

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, tokens, width), "mask": (n, tokens)}"""
        states, mask, *_ = pipe.encode_prompt(prompts, False, device=pipe.text_encoder.device)
        return {"states": states, "mask": mask.to(states.dtype)}

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """The VAE posterior's mode times its scaling factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` are timesteps of the training schedule; the second half of the channels, the variance, is left out."""
        answer: Tensor = denoiser(
            noisy,
            encoder_hidden_states=conditioning["states"],
            encoder_attention_mask=conditioning["mask"],
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return answer[:, : noisy.shape[1]]


PIXART = PixArtSigma()
