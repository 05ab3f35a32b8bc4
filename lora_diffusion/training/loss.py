"""How far an answer is from its target, and how much each timestep counts.

    mse         e²
    huber       e²/2 where |e| < delta, else delta (|e| - delta/2)      (Huber 1964; outliers pull linearly)
    smooth_l1   the same over delta
    min-SNR     weight min(SNR, γ) / SNR for epsilon, min(SNR, γ) / (SNR + 1) for v    (Hang 2023, arXiv 2303.09556)

SNR = ᾱ / (1 - ᾱ). Both weights are min(SNR, γ) on the error of the clean picture, as the paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lora_diffusion.errors import ConfigError
from lora_diffusion.training.sections import LossConfig

Kind = Literal["mse", "huber", "smooth_l1"]


@dataclass(frozen=True)
class Loss:
    """An elementwise error. `weights` are of timesteps, (timesteps,) float32, or None: all count 1."""

    kind: Kind = "mse"
    delta: float = 0.1
    weights: Tensor | None = None

    def errors(self, answer: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """(n, …) float32, in the shape of both; `times` (n,) as the objective draws them."""
        if self.kind == "mse":
            found = (answer - target).square()
        elif self.kind == "huber":
            found = F.huber_loss(answer, target, reduction="none", delta=self.delta)
        else:
            found = F.smooth_l1_loss(answer, target, reduction="none", beta=self.delta)
        if self.weights is None:
            return found
        return found * self.weights[times.cpu()].to(found.device).view(-1, *[1] * (found.dim() - 1))


MSE = Loss()


def loss_for(settings: LossConfig, schedule: tuple[Tensor, str] | None) -> Loss:
    """The loss that `settings` say, over a `schedule` of (ᾱ (timesteps,), "epsilon" or "v_prediction").

    ConfigError for min-SNR where there is no schedule, as in flows.
    """
    if settings.snr_gamma is None:
        return Loss(settings.kind, settings.delta)
    if schedule is None:
        raise ConfigError(
            f"loss.snr_gamma = {settings.snr_gamma} is for bases that predict epsilon or v, and this one is a flow;"
            " leave it out (which times a flow is trained at is set under [times])"
        )
    return Loss(settings.kind, settings.delta, min_snr(*schedule, settings.snr_gamma))


def min_snr(alphas: Tensor, target: str, gamma: float) -> Tensor:
    """Weights of timesteps, (timesteps,), from ᾱ (timesteps,). At SNR 0 epsilon has its limit 1, and v 0."""
    snr = alphas / (1 - alphas)
    if target == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)
