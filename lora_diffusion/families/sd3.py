"""Stable Diffusion 3 and 3.5: a flow-matching transformer on two CLIPs and a T5."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import picture_latents


class StableDiffusion3:
    """SD 3 and 3.5, medium and large; any of the three text encoders may be absent, as in Diffusers."""

    name = "sd3"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over an SD3Transformer2DModel."""
        return has_denoiser(pipe, "SD3Transformer2DModel")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, CLIP + T5 tokens, width), "pooled": (n, width)}"""
        states, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device=pipe.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """(mode - shift_factor) * scaling_factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the transformer counts to 1,000 and answers noise - latents."""
        return denoiser(
            hidden_states=noisy,
            timestep=time * 1000,
            encoder_hidden_states=conditioning["states"],
            pooled_projections=conditioning["pooled"],
        ).sample


SD3 = StableDiffusion3()
