"""What is minimised: noise a latent, ask the denoiser, compare. Shared by every family.

    diffusion   x_t = √ᾱ_t x + √(1 - ᾱ_t) ε; target ε or v = √ᾱ_t ε - √(1 - ᾱ_t) x   (Ho 2020; Salimans & Ho 2022)
    flow        x_s = (1 - s) x + s ε; target ε - x; s logit-normal, shifted        (Lipman 2022; Esser et al. 2024)

Schedules come from the pipeline's own scheduler, zero terminal SNR included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.families import Conditioning, Family
from lora_diffusion.training.loss import MSE, Loss
from lora_diffusion.training.sections import TimesConfig

Size = tuple[int, int]  # height and width of latents
FLUX2_STEPS = 50  # of sampling, on which FLUX.2's shift depends
AS_EVER, UNIFORM = TimesConfig.model_construct(), TimesConfig.model_construct(sampling="uniform")


class Objective(Protocol):
    """One kind of process."""

    @property
    def schedule(self) -> tuple[Tensor, str] | None:
        """(ᾱ (timesteps,), "epsilon" or "v_prediction"); None where times are no timesteps."""
        ...

    def draw(self, count: int, generator: torch.Generator, size: Size = (0, 0)) -> Tensor:
        """Random times, (count,): integer timesteps or sigmas in (0, 1), of latents of that height and width."""
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
    emphasis: float = 0.0

    @property
    def schedule(self) -> tuple[Tensor, str]:
        """ᾱ and what is predicted."""
        return self.alphas, self.target

    def draw(self, count: int, generator: torch.Generator, size: Size = (0, 0)) -> Tensor:
        """Uniform timesteps, or more of them at one end."""
        if self.emphasis:
            levels = emphasised(torch.rand(count, generator=generator), self.emphasis)
            return (levels * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
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
class SizeShift:
    """A scheduler's shift by the 2x2 patches of latents, linear in them before `exponential` (Esser et al. 2024)."""

    fewest: int
    most: int
    low: float
    high: float
    exponential: bool

    def __call__(self, size: Size) -> float:
        """What `_shifted` takes."""
        tokens = (size[0] // 2) * (size[1] // 2)
        mu = self.low + (self.high - self.low) * (tokens - self.fewest) / (self.most - self.fewest)
        return math.exp(mu) if self.exponential else mu


def flux2_shift(size: Size) -> float:
    """FLUX.2's own, of latents whose pixels are patches already, at the steps that its pipelines have by default."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return math.exp(compute_empirical_mu(size[0] * size[1], FLUX2_STEPS))


@dataclass(frozen=True)
class Flow:
    """Rectified flow; `shift` is the base's own and moves sigmas towards the noisy end, as `by_size` does if given."""

    shift: float = 1.0
    times: TimesConfig = AS_EVER
    by_size: Callable[[Size], float] | None = None
    schedule: None = None

    def draw(self, count: int, generator: torch.Generator, size: Size = (0, 0)) -> Tensor:
        """Logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1) or uniform sigmas, emphasised, shifted."""
        if self.times.sampling == "uniform":
            sigma = torch.rand(count, generator=generator)
        else:
            sigma = torch.sigmoid(torch.randn(count, generator=generator) * self.times.std + self.times.mean)
        sigma = emphasised(sigma, self.times.emphasis)
        if self.by_size is not None:
            return _shifted(sigma, self.by_size(size))
        return _shifted(sigma, self.shift if self.times.shift is None else self.times.shift)

    def grid(self, bands: int) -> Tensor:
        """Midpoints of equal bands, with the base's own shift whatever is trained at."""
        return _shifted((torch.arange(bands) + 0.5) / bands, self.shift)

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Straight path and its velocity."""
        sigma = times.to(latents.device).view(-1, *[1] * (latents.dim() - 1))
        return ((1 - sigma) * latents + sigma * noise).to(latents.dtype), noise - latents


def objective_for(family: Family, scheduler: Any, times: TimesConfig = AS_EVER) -> Objective:
    """The objective that a pipeline's scheduler was made for, with sigmas of flows drawn as `times` says.

    ConfigError for an unknown prediction type, and for `times` that do not fit.
    """
    if times.zero_snr:
        scheduler = with_zero_snr(family, scheduler)
        times = times.model_copy(update={"zero_snr": False})
    if family.process == "flow":
        if times.sampling == "uniform" and (times.mean, times.std) != (0, 1):
            raise ConfigError("times.mean and times.std are of 'logit-normal', and times.sampling is 'uniform'")
        shift = float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)
        return Flow(shift, times, _size_shift(family, scheduler.config, times) if times.dynamic else None)
    if times.model_copy(update={"emphasis": 0.0}) not in (AS_EVER, UNIFORM):
        raise ConfigError(
            f"[times] but for emphasis is for flows, and family {family.name!r} draws its timesteps uniformly;"
            " leave it out"
        )
    from diffusers import DDPMScheduler

    target = str(scheduler.config.get("prediction_type", "epsilon"))
    if target not in ("epsilon", "v_prediction"):
        raise ConfigError(f"scheduler predicts {target!r}; expected 'epsilon' or 'v_prediction'")
    schedule: Any = DDPMScheduler.from_config(scheduler.config)
    return Diffusion(schedule.alphas_cumprod, target, times.emphasis)


def with_zero_snr(family: Family, scheduler: Any) -> Any:
    """A scheduler like this one, its betas rescaled so that nothing of the picture is left in the last timestep.

    Drawing begins there too (Lin et al. 2023, arXiv 2305.08891, sections 3.1 and 3.3). ConfigError but for v.
    """
    from diffusers import DDIMScheduler

    if family.process == "flow" or scheduler.config.get("prediction_type") != "v_prediction":
        raise ConfigError(
            f"times.zero_snr is for bases that predict v: pure noise says nothing of epsilon, and flows end in it"
            f" anyway; leave it out for this {family.name!r}"
        )
    kind: Any = type(scheduler) if "rescale_betas_zero_snr" in scheduler.config else DDIMScheduler
    return kind.from_config(scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def emphasised(levels: Tensor, emphasis: float) -> Tensor:
    """Noise levels in [0, 1], (n,), moved to the clean end (`emphasis` up to 1) or the noisy one (down to -1).

    At ±1 by cubic sampling (Mou et al. 2023, arXiv 2302.08453, section 3.4), which ai-toolkit calls "style" and
    "content"; in between by that much of the way there.
    """
    if not emphasis:
        return levels
    share, low = abs(emphasis), levels if emphasis > 0 else 1 - levels
    moved = (1 - share) * low + share * low**3
    return moved if emphasis > 0 else 1 - moved


def _size_shift(family: Family, config: Any, times: TimesConfig) -> Callable[[Size], float]:
    if times.shift is not None:
        raise ConfigError("times.dynamic and times.shift are two shifts; leave one out")
    if not config.get("use_dynamic_shifting"):
        raise ConfigError(f"times.dynamic: the scheduler of this {family.name!r} has no shift by size; leave it off")
    if family.name == "flux2":
        return flux2_shift
    return SizeShift(
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
        config.get("time_shift_type", "exponential") == "exponential",
    )


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def losses(
    family: Family,
    objective: Objective,
    denoiser: nn.Module,
    latents: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    times: Tensor,
    masks: Tensor | None = None,
    loss: Loss = MSE,
) -> Tensor:
    """Mean error of each picture, (n,) float32; with `masks` (n, 1, h, w) the mean weighted by them."""
    noisy, target = objective.noised(latents, noise, times)
    return towards(target, family, denoiser, noisy, conditioning, times, loss, masks)


def towards(
    target: Tensor,
    family: Family,
    denoiser: nn.Module,
    noisy: Tensor,
    conditioning: Conditioning,
    times: Tensor,
    loss: Loss = MSE,
    masks: Tensor | None = None,
) -> Tensor:
    """Mean error of the denoiser's answer from `target` (n, channels, h, w), (n,) float32, weighted as in `losses`."""
    answer = family.predict(denoiser, noisy, times.to(noisy.device), conditioning)
    error = loss.errors(answer.float(), target.float(), times)
    if masks is None:
        return error.flatten(1).mean(1)
    weights = masks.float().expand_as(error)
    return (error * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1e-6)
