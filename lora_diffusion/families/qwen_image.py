"""Qwen-Image: a flow-matching transformer over packed 2x2 latent patches, on Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_diffusion.families import Conditioning, Process, has_denoiser
from lora_diffusion.families.encoding import by_channel, pack, padded, unpack

TOKENS = 512  # what the pipeline cuts prompts at


class QwenImage:
    """Qwen-Image; its VAE is one for video, given one frame."""

    name = "qwen-image"
    process: Process = "flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    kept: tuple[str, ...] = ()
    sized = False

    def matches(self, pipe: Any) -> bool:
        """The text-to-image pipeline: the others of this transformer want a picture to edit."""
        return has_denoiser(pipe, "QwenImageTransformer2DModel") and type(pipe).__name__ == "QwenImagePipeline"

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """{"states": (n, 512, width), "mask": (n, 512)}"""
        states, mask = pipe.encode_prompt(prompts, pipe.text_encoder.device, max_sequence_length=TOKENS)
        lengths = [states.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return padded([row[:length] for row, length in zip(states, lengths, strict=True)], TOKENS)

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """(mode - latents_mean) / latents_std, channel by channel."""
        vae = pipe.vae
        latents: Tensor = vae.encode(pictures.to(vae.device, vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0]
        return by_channel(latents, vae.config)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """`time` is sigma in [0, 1]; the answer is the velocity noise - latents."""
        batch, _, height, width = noisy.shape
        mask = conditioning["mask"].bool()
        longest = int(mask.sum(1).max())
        answer = denoiser(
            hidden_states=pack(noisy),
            timestep=time.to(noisy.dtype),
            encoder_hidden_states=conditioning["states"][:, :longest],
            encoder_hidden_states_mask=None if batch == 1 else mask[:, :longest],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
        ).sample
        return unpack(answer, height, width)


QWEN_IMAGE = QwenImage()
