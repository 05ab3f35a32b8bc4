"""Chroma: FLUX.1 without CLIP and guidance, its modulation made by one small network, its T5 masked."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ChromaPipeline
from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import pack, picture_latents, unpack


class Chroma:
    """Chroma1 and models built the same way."""

    name = "chroma"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ("distilled_guidance_layer",)  # makes the modulation of every block
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over a ChromaTransformer2DModel."""
        return has_denoiser(pipe, "ChromaTransformer2DModel")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, 512, width), "mask": (n, 512)}; the mask leaves one padding token in."""
        states, _, mask, *_ = pipe.encode_prompt(
            prompts, device=pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"states": states, "mask": mask}

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """(mode - shift_factor) * scaling_factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the answer is the velocity noise - latents."""
        batch, _, height, width = noisy.shape
        place: dict[str, Any] = {"device": noisy.device, "dtype": noisy.dtype}
        states, packed = conditioning["states"], pack(noisy)
        answer = denoiser(
            hidden_states=packed,
            timestep=time.to(noisy.dtype),
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, **place),
            img_ids=ChromaPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, **place),  # pyright: ignore[reportPrivateUsage]
            attention_mask=torch.cat([conditioning["mask"], packed.new_ones(packed.shape[:2])], dim=1),
        ).sample
        return unpack(answer, height, width)


CHROMA = Chroma()
