"""Losses of batches: to train on, noise and times drawn by (seed, batch); to measure by, at fixed ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.families import Family
from lora_diffusion.pipelines import Opened
from lora_diffusion.recomputing import Recompute
from lora_diffusion.training.batches import Batch, Batches, generator_for
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.loss import MSE, Loss, loss_for
from lora_diffusion.training.objective import Objective, losses, objective_for, towards, with_zero_snr
from lora_diffusion.training.preparation import Prepared
from lora_diffusion.training.sections import LoopConfig
from lora_diffusion.training.trained import Trained

HELDOUT_BANDS = 8  # fixed times at which each held-out picture is measured


class Judge:
    """A run's denoiser on its prepared pictures. `trained` is set once there is something."""

    def __init__(self, config: TrainConfig, opened: Opened, family: Family, prepared: Prepared) -> None:
        self.config, self.family, self.prepared = config, family, prepared
        self.denoiser: nn.Module = getattr(opened.pipe, family.denoiser)
        if config.times.zero_snr:  # previews are drawn so, too
            opened.pipe.scheduler = with_zero_snr(family, opened.pipe.scheduler)
        self.objective: Objective = objective_for(family, opened.pipe.scheduler, config.times)
        if config.loss.noise_offset and self.objective.schedule is None:
            raise ConfigError(f"loss.noise_offset is for epsilon and v, and {family.name!r} is a flow; leave it out")
        self.loss = loss_for(config.loss, self.objective.schedule)
        self.place: dict[str, Any] = {"device": opened.device, "dtype": opened.dtype}
        self.trained: Trained | None = None
        self.pipe: Any = opened.pipe

    def parts(self, batch: Batch, index: int) -> Iterator[Tensor]:
        """The loss of batch number `index`, and of what is to be preserved: each to be run backward by itself."""
        noise, times = self._draw("noise", batch, index)
        yield self._losses(batch, noise, times, self.loss).mean()
        prior = self.config.prior
        if prior.kind == "teacher":
            yield prior.weight * self._from_the_base(batch, noise, times)
        elif self.prepared.prior is not None:
            other = self.prepared.prior.draw(index)
            yield prior.weight * self._losses(other, *self._draw("prior noise", other, index), self.loss).mean()

    @torch.no_grad()
    def bands(self, batches: Batches) -> list[float]:
        """Mean loss over all items at each of `HELDOUT_BANDS` fixed times, clean to noisy; none without items.

        Noise depends on an item's place, not on `train.batch`, and the error is squared whatever is trained with.
        """
        assert self.trained is not None
        self.trained.training(False)
        sums, count = [0.0] * HELDOUT_BANDS, 0
        for batch in batches.in_order():
            for band, time in enumerate(self.objective.grid(HELDOUT_BANDS)):
                drawn = (generator_for(0, "heldout", count + i, band) for i in range(len(batch.latents)))
                noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=one) for one in drawn])
                sums[band] += self._losses(batch, noise, time.repeat(len(batch.latents))).sum().item()
            count += len(batch.latents)
        self.trained.training(True)
        return [total / count for total in sums] if count else []

    def _draw(self, what: str, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        generator = generator_for(self.config.train.seed, what, index)
        torch.manual_seed(generator.initial_seed())  # dropout masks
        noise = torch.randn(batch.latents.shape, generator=generator)
        if offset := self.config.loss.noise_offset:  # crosslabs.org/blog/diffusion-with-offset-noise
            noise += offset * torch.randn(*noise.shape[:2], 1, 1, generator=generator)
        height, width = batch.latents.shape[-2:]
        return noise, self.objective.draw(len(batch.latents), generator, (height, width))

    def _losses(self, batch: Batch, noise: Tensor, times: Tensor, loss: Loss = MSE) -> Tensor:
        latents, noise = batch.latents.to(**self.place), noise.to(**self.place)
        masks = None if batch.masks is None else batch.masks.to(self.place["device"])
        with keeping_less(self.config.train):
            conditioning = self._conditioning(batch.conditioning, batch.texts)
            self._tell(times)
            return losses(self.family, self.objective, self.denoiser, latents, conditioning, noise, times, masks, loss)

    def _from_the_base(self, batch: Batch, noise: Tensor, times: Tensor) -> Tensor:
        """How far the answer under the class's name is from the base's own."""
        assert self.trained is not None
        latents, noise = batch.latents.to(**self.place), noise.to(**self.place)
        noisy, _ = self.objective.noised(latents, noise, times)
        self.trained.weigh(0.0)
        with torch.no_grad():
            conditioning = self._conditioning(batch.plain, batch.plain_texts)
            target = self.family.predict(self.denoiser, noisy, times.to(noisy.device), conditioning)
        self.trained.weigh(1.0)
        with keeping_less(self.config.train):
            heard = self._conditioning(batch.plain, batch.plain_texts)
            self._tell(times)
            return towards(target, self.family, self.denoiser, noisy, heard, times, self.loss).mean()

    def _tell(self, times: Tensor) -> None:
        """Fading methods hear of the noise; before there is anything to train there is nobody to hear it."""
        if self.trained is not None:
            schedule = self.objective.schedule
            self.trained.at(times if schedule is None else times / len(schedule[0]))

    def _conditioning(self, cached: dict[str, Tensor], texts: tuple[str, ...]) -> dict[str, Tensor]:
        """What was cached, and `texts` encoded now where text encoders are trained."""
        found = cached | (self.family.encode_prompts(self.pipe, list(texts)) if self.config.text.live else {})
        return {name: value.to(**self.place) for name, value in found.items()}


def keeping_less(loop: LoopConfig) -> AbstractContextManager[object]:
    """For a forward pass: `Recompute`, where it is asked for and neither checkpoints nor a compiler do the like."""
    return Recompute() if loop.recompute and not (loop.checkpointing or loop.compile) else nullcontext()


def mean(bands: list[float]) -> float:
    """Of held-out losses by band; not a number where there are none."""
    return sum(bands) / len(bands) if bands else math.nan
