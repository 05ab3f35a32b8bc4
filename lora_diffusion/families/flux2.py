"""FLUX.2: a flow-matching transformer over normalised 2x2 latent patches, on middle layers of a language model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.flux import GUIDANCE, is_guided


class Flux2:
    """FLUX.2 klein (Qwen3) and dev (Mistral, guidance-distilled)."""

    name = "flux2"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ("*_stream_modulation*",)  # three layers steer every block: their error is everywhere
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over a Flux2Transformer2DModel."""
        return has_denoiser(pipe, "Flux2Transformer2DModel")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, 512, 3 · width)}: padded, and the padding is attended to, as in the pipeline."""
        states, _ = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
        return {"states": states}

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """2x2 patches of the mode as channels, normalised by the VAE's running statistics: (n, 4 c, h/2, w/2)."""
        return pipe._encode_vae_image(pictures.to(pipe.vae.device, pipe.vae.dtype), None)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the answer is the velocity noise - latents."""
        states = conditioning["states"]
        guidance = torch.full((len(noisy),), GUIDANCE, device=noisy.device, dtype=noisy.dtype)
        answer: Tensor = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=time.to(noisy.dtype),
            guidance=guidance if is_guided(denoiser) else None,
            encoder_hidden_states=states,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(states).to(noisy.device),  # pyright: ignore[reportPrivateUsage]
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy).to(noisy.device),  # pyright: ignore[reportPrivateUsage]
        ).sample
        return answer.transpose(1, 2).reshape(noisy.shape)


FLUX2 = Flux2()
