"""AuraFlow: a flow-matching transformer on one T5-like encoder, told its time as sigma in [0, 1]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import picture_latents


class AuraFlow:
    """AuraFlow 0.1 to 0.3 and models built the same way, such as Pony V7."""

    name = "auraflow"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """Any pipeline over an AuraFlowTransformer2DModel."""
        return has_denoiser(pipe, "AuraFlowTransformer2DModel")

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, 256, width)}, zeros behind each prompt's end."""
        states, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipe.text_encoder.device)
        return {"states": states}

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """The VAE posterior's mode times its scaling factor."""
        return picture_latents(pipe.vae, pictures)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The answer is noise - latents."""
        states = conditioning["states"]
        return denoiser(hidden_states=noisy, encoder_hidden_states=states, timestep=time.to(noisy.dtype)).sample


AURAFLOW = AuraFlow()
