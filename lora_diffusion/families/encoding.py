"""What families share between pipeline and denoiser: scaled latents, 2x2 patches, prompts of unequal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_channel", "instead_of_empty", "pack", "padded", "picture_latents", "unpack"]


def picture_latents(vae: Any, pictures: Tensor) -> Tensor:
    """(n, 3, height, width) in [-1, 1] -> the posterior's mode, centred and scaled as the VAE's configuration says.

    A VAE that overflows in float16 (`force_upcast`) works in float32 for the while.
    """
    config, dtype = vae.config, vae.dtype
    if upcast := dtype == torch.float16 and bool(config.get("force_upcast")):
        vae.to(torch.float32)
    encoded = vae.encode(pictures.to(vae.device, vae.dtype))
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    if upcast:
        vae.to(dtype)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return (by_channel(latents, config) * config.scaling_factor).to(dtype)
    return ((latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor).to(dtype)


def by_channel(latents: Tensor, config: Any) -> Tensor:
    """(n, c, h, w), each channel centred and scaled by the configuration's `latents_mean` and `latents_std`."""
    mean, std = (latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latents - mean) / std


def pack(latents: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h/2 · w/2, 4 c): one token a 2x2 patch, as Diffusers' `_pack_latents`."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """(n, h/2 · w/2, 4 c) -> (n, c, h, w), the inverse of `pack`."""
    patches = packed.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(packed.shape[0], -1, height, width)


def padded(states: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """Token states (tokens, width) of each prompt -> {"states": (n, length, width), "mask": (n, length)}.

    Captions are cached and drawn one by one, so all must have one shape; `predict` cuts the zeros off again.
    """
    rows = torch.stack([torch.nn.functional.pad(s[:length], (0, 0, 0, max(0, length - len(s)))) for s in states])
    mask = torch.stack([torch.arange(length, device=s.device) < len(s) for s in states])
    return {"states": rows, "mask": mask.to(rows.dtype)}


def instead_of_empty(prompts: Sequence[str], **tensors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Name -> (given, empty), each (n, …): the given, but the empty one where there is no prompt.

    Empty is what guidance is told away from.

    Some pipelines encode a missing prompt in another way than an empty one (zeros, no system prompt); caption
    dropout has to train that way.
    """
    blank = torch.tensor([not prompt for prompt in prompts])
    return {
        name: torch.where(blank.to(given.device).view(-1, *[1] * (given.dim() - 1)), empty, given)
        for name, (given, empty) in tensors.items()
    }
