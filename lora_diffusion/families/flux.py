"""FLUX.1: a flow-matching transformer over packed 2x2 latent patches, CLIP pooled and T5 token states."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import pack, picture_latents, unpack

GUIDANCE = 1.0  # what guidance-distilled transformers are trained at (kohya, ai-toolkit and Diffusers scripts)


class Flux:
    """FLUX.1 dev and schnell, and models built the same way."""

    name = "flux"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2")
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over a FluxTransformer2DModel."""
        return has_denoiser(pipe, "FluxTransformer2DModel")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, tokens, width), "pooled": (n, width)}"""
        length = min(512, pipe.tokenizer_2.model_max_length)
        states, pooled, _ = pipe.encode_prompt(
            prompts, None, device=pipe.text_encoder.device, max_sequence_length=length
        )
        return {"states": states, "pooled": pooled}

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """(mode - shift_factor) * scaling_factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the answer is the velocity noise - latents."""
        batch, _, height, width = noisy.shape
        place: dict[str, Any] = {"device": noisy.device, "dtype": noisy.dtype}
        ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, **place)  # pyright: ignore[reportPrivateUsage]
        states = conditioning["states"]
        answer = denoiser(
            hidden_states=pack(noisy),
            timestep=time.to(noisy.dtype),
            guidance=torch.full((batch,), GUIDANCE, **place) if is_guided(denoiser) else None,
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, **place),
            img_ids=ids,
        ).sample
        return unpack(answer, height, width)


def is_guided(denoiser: Any) -> bool:
    """Whether the denoiser was distilled to take the guidance as an input (FLUX.1 dev, Kontext)."""
    return bool(denoiser.config.guidance_embeds)


FLUX = Flux()
