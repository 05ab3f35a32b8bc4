"""What is minimised: noise a latent, ask the denoiser, compare. Shared by every family.

    diffusion   x_t = √ᾱ_t x + √(1 - ᾱ_t) ε; target ε or v = √ᾱ_t ε - √(1 - ᾱ_t) x   (Ho 2020; Salimans & Ho 2022)
    flow        x_s = (1 - s) x + s ε; target ε - x; s logit-normal, shifted        (Lipman 2022; Esser et al. 2024)

Schedules come from the pipeline's own scheduler, zero terminal SNR included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.families import Conditioning, Family


class Objective(Protocol):
    """One kind of process."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times, (count,): integer timesteps or sigmas in (0, 1)."""
        ...

    def grid(self, bands: int) -> Tensor:
        """`bands` fixed times from the clean to the noisy end, to measure losses at."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy latents, target), both in the latents' shape."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """Discrete noise schedules. `alphas` are ᾱ_t, (timesteps,) float32; `target` is "epsilon" or "v_prediction"."""

    alphas: Tensor
    target: str

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform timesteps."""
        return torch.randint(len(self.alphas), (count,), generator=generator)

    def grid(self, bands: int) -> Tensor:
        """Midpoints of equal bands."""
        return ((torch.arange(bands) + 0.5) / bands * len(self.alphas)).long()

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Forward process and its target."""
        alpha = self.alphas.to(latents.device)[times.to(latents.device)].view(-1, *[1] * (latents.dim() - 1))
        signal, scatter = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = (signal * latents + scatter * noise).to(latents.dtype)
        if self.target == "epsilon":
            return noisy, noise
        return noisy, (signal * noise - scatter * latents).to(latents.dtype)


@dataclass(frozen=True)
class Flow:
    """Rectified flow; `shift` moves the sampled sigmas towards the noisy end."""

    shift: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Logit-normal sigmas (Esser et al. 2024, arXiv 2403.03206, section 3.1), shifted."""
        return self._shifted(torch.sigmoid(torch.randn(count, generator=generator)))

    def grid(self, bands: int) -> Tensor:
        """Midpoints of equal bands, shifted."""
        return self._shifted((torch.arange(bands) + 0.5) / bands)

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Straight path and its velocity."""
        sigma = times.to(latents.device).view(-1, *[1] * (latents.dim() - 1))
        return ((1 - sigma) * latents + sigma * noise).to(latents.dtype), noise - latents

    def _shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


def objective_for(family: Family, scheduler: Any) -> Objective:
    """The objective that a pipeline's scheduler was made for. ConfigError for an unknown prediction type."""
    if family.process == "flow":
        return Flow(float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0))
    from diffusers import DDPMScheduler

    target = str(scheduler.config.get("prediction_type", "epsilon"))
    if target not in ("epsilon", "v_prediction"):
        raise ConfigError(f"scheduler predicts {target!r}; expected 'epsilon' or 'v_prediction'")
    schedule: Any = DDPMScheduler.from_config(scheduler.config)
    return Diffusion(schedule.alphas_cumprod, target)


def losses(
    family: Family,
    objective: Objective,
    denoiser: nn.Module,
    latents: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    times: Tensor,
    masks: Tensor | None = None,
) -> Tensor:
    """Mean squared error of each picture, (n,) float32; with `masks` (n, 1, h, w) the mean weighted by them."""
    noisy, target = objective.noised(latents, noise, times)
    answer = family.predict(denoiser, noisy, times.to(latents.device), conditioning)
    error = (answer.float() - target.float()).square()
    if masks is None:
        return error.flatten(1).mean(1)
    weights = masks.float().expand_as(error)
    return (error * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1e-6)
