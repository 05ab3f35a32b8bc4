"""The training loop: a frozen backbone, fresh slots, one small file out.

    style.toml -> TrainConfig -> pictures, captions -> cached latents and embeddings -> batches
    -> family.predict(4-bit denoiser with slots) -> step -> Adapter -> adapter.safetensors

Interrupted, the same call goes on from the last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.attachment import Attachment
from lora_diffusion.errors import ConfigError, LoraDiffusionError, some
from lora_diffusion.families import Family, family_of
from lora_diffusion.pipelines import Opened, load_pipeline
from lora_diffusion.quantize import fingerprint
from lora_diffusion.training.adapting import attach_for, format_for
from lora_diffusion.training.averaging import Average
from lora_diffusion.training.batches import Batch, Batches, generator_for
from lora_diffusion.training.checkpoints import (
    Checkpoint,
    check_settings,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from lora_diffusion.training.config import TrainConfig, default_settings
from lora_diffusion.training.continuing import continue_from
from lora_diffusion.training.finishing import finish
from lora_diffusion.training.interruption import Interruption
from lora_diffusion.training.loss import MSE, Loss, loss_for
from lora_diffusion.training.objective import Objective, losses, objective_for
from lora_diffusion.training.optimizers import optimizer_for, restore, state_of
from lora_diffusion.training.preparation import Prepared, prepare
from lora_diffusion.training.processes import Processes
from lora_diffusion.training.rates import rate
from lora_diffusion.training.recipes import steps_for
from lora_diffusion.training.results import DivergedError, Listener, Progress, TrainResult

SHOWN_BATCHES = 8  # what a start from the data is taken from
HELDOUT_BANDS = 8  # fixed times at which each held-out picture is measured
_FREE = frozenset(  # may change on resuming; of `init_from` the content is compared
    {"train.checkpoint_every", "train.checkpointing", "output", "name", "data.skip_bad", "adapter.init_from"}
)


def train(config: TrainConfig, listen: Listener = lambda progress: None) -> TrainResult:
    """Train the adapter that `config` describes. Raises LoraDiffusionError subclasses, each with one sentence."""
    processes = Processes(config.backbone.device)
    opened = load_pipeline(
        config.base,
        precision=config.backbone.precision,
        compute=config.backbone.compute,
        device=str(processes.device) if processes.count > 1 else config.backbone.device,
    )
    family = family_of(opened.pipe)
    prepared = prepare(config, opened, family, lambda done, total: listen(Progress("prepare", done, total)))
    run = Run(_settled(config, prepared, processes), opened, family, prepared, processes)
    return run.go(listen)


def _settled(config: TrainConfig, prepared: Prepared, processes: Processes) -> TrainConfig:
    """`config` with the number of steps that the pictures ask for."""
    loop = config.train
    seen = sum(item.share for item in prepared.training.items)
    steps = steps_for(loop.steps, loop.exposures, seen, loop.batch * loop.accumulate * processes.count)
    return config.model_copy(update={"train": loop.model_copy(update={"steps": steps})})


class Run:
    """One training run over prepared data."""

    def __init__(
        self, config: TrainConfig, opened: Opened, family: Family, prepared: Prepared, processes: Processes
    ) -> None:
        self.config, self.opened, self.family, self.processes = config, opened, family, processes
        self.denoiser: nn.Module = getattr(opened.pipe, family.denoiser)
        self.objective: Objective = objective_for(family, opened.pipe.scheduler, config.times)
        self.loss = loss_for(config.loss, self.objective.schedule)
        self.data, self.heldout = prepared.training, prepared.heldout
        self.prepared = prepared
        self.before = fingerprint(self.denoiser)
        self.tell: Callable[[Tensor], None] = lambda noise: None  # what fades with it; starts run without slots
        self.attachment = self._attach()
        self.tell = self.attachment.at
        self.start = self._begin()
        if config.train.checkpointing:
            turn_on_checkpointing(self.denoiser)
        self.format = format_for(self.attachment, config.adapter.format)
        groups = self.attachment.groups(config.train.lr, config.train.up_ratio)
        self.optimizer = optimizer_for(config.train, groups)
        self.average = None if config.train.ema is None else Average(self.attachment, config.train.ema)
        self.step, self.losses = 0, list[float]()
        self.checkpoints = config.output / "checkpoints"
        self._resume()

    def go(self, listen: Listener) -> TrainResult:
        """Train to the end or to an interruption."""
        start, total = time.monotonic(), self.config.train.steps
        with Interruption() as interruption:
            while self.step < total and not interruption.asked:
                self.losses.append(self._one_step())
                self.step += 1
                listen(Progress("train", self.step, total, self.losses[-1]))
                if self.step % self.config.train.checkpoint_every == 0 or self.step == total or interruption.asked:
                    self._save()
        seconds = time.monotonic() - start
        return finish(self, seconds, listen) if self.step >= total else self._stopped(seconds)

    def _attach(self) -> Attachment:
        def show() -> None:
            for index in range(SHOWN_BATCHES):
                self._loss(self.data.draw(index), index)

        return attach_for(self.config, self.denoiser, self.family.denoiser, show)

    def _begin(self) -> str | None:
        """The content hash of the file that is gone on from."""
        path = self.config.adapter.init_from
        try:
            return None if path is None else continue_from(path, [self.attachment])
        except LoraDiffusionError:
            self.attachment.detach()
            raise

    def _one_step(self) -> float:
        settings, ranks = self.config.train, self.processes.count
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * group["ratio"] * rate(self.step, settings)
        self.optimizer.zero_grad(set_to_none=True)
        total, names = 0.0, list[str]()
        for part in range(settings.accumulate):
            index = (self.step * ranks + self.processes.index) * settings.accumulate + part
            batch = self.data.draw(index)
            loss = self._loss(batch, index) / settings.accumulate
            loss.backward()
            total, names = total + loss.item(), [*names, *batch.names]
        if course := self.attachment.course:
            course.penalty().backward()
        total = self.processes.mean(total)
        self.processes.average_gradients(self.attachment.parameters())
        norm = nn.utils.clip_grad_norm_(self.attachment.parameters(), settings.clip)
        if not (math.isfinite(total) and math.isfinite(norm.item())):
            raise DivergedError(self._diverged(total, norm.item(), names))
        self.optimizer.step()
        if course:
            course.after(self.step + 1)
        if self.config.adapter.max_norm is not None:
            self.attachment.cap(self.config.adapter.max_norm)
        if self.average:
            self.average.update(self.step + 1)
        return total

    def _loss(self, batch: Batch, index: int) -> Tensor:
        generator = generator_for(self.config.train.seed, "noise", index)
        torch.manual_seed(generator.initial_seed())  # dropout masks
        noise = torch.randn(batch.latents.shape, generator=generator)
        times = self.objective.draw(len(batch.latents), generator)
        return self._losses(batch, noise, times, self.loss).mean()

    def _losses(self, batch: Batch, noise: Tensor, times: Tensor, loss: Loss = MSE) -> Tensor:
        place: dict[str, Any] = {"device": self.opened.device, "dtype": self.opened.dtype}
        conditioning = {name: value.to(**place) for name, value in batch.conditioning.items()}
        latents, noise = batch.latents.to(**place), noise.to(**place)
        self.tell(times if self.objective.schedule is None else times / len(self.objective.schedule[0]))
        masks = None if batch.masks is None else batch.masks.to(self.opened.device)
        return losses(self.family, self.objective, self.denoiser, latents, conditioning, noise, times, masks, loss)

    @torch.no_grad()
    def measure(self, batches: Batches) -> float:
        """Mean loss over all items at `HELDOUT_BANDS` fixed times, with noise that depends on the place alone."""
        for slot in self.attachment.slots.values():
            slot.eval()
        sums, count = 0.0, 0
        for place, batch in enumerate(batches.in_order()):
            for band, time_ in enumerate(self.objective.grid(HELDOUT_BANDS)):
                noise = torch.randn(batch.latents.shape, generator=generator_for(0, "heldout", place, band))
                sums += self._losses(batch, noise, time_.repeat(len(batch.latents))).sum().item()
                count += len(batch.latents)
        for slot in self.attachment.slots.values():
            slot.train()
        return sums / count if count else math.nan

    def _save(self) -> None:
        if self.processes.index == 0:
            state, average = state_of(self.optimizer), self.average.tensors if self.average else {}
            whole = Checkpoint(self.step, self.attachment.state(), state, self._settings(), self.losses, average)
            save_checkpoint(self.checkpoints, whole)
        self.processes.wait()

    def _resume(self) -> None:
        found = find_checkpoints(self.checkpoints)
        if not found:
            return
        checkpoint = load_checkpoint(found[-1])
        check_settings(checkpoint.settings, self._settings(), _FREE, found[-1], default_settings())
        self.attachment.restore(checkpoint.parameters)
        if self.average:
            self.average.restore(checkpoint.average)
        restore(self.optimizer, checkpoint.optimizer)
        self.step, self.losses = checkpoint.step, checkpoint.losses

    def _settings(self) -> dict[str, Any]:
        made_of = {"pictures": self.prepared.digest, "backbone": self.before, "start": self.start}
        return self.config.model_dump(mode="json") | made_of

    def _stopped(self, seconds: float) -> TrainResult:
        self.attachment.detach()
        unchanged = fingerprint(self.denoiser) == self.before
        return TrainResult(None, self.step, seconds, self.losses, backbone_unchanged=unchanged)

    def _diverged(self, loss: float, norm: float, names: list[str]) -> str:
        kept = find_checkpoints(self.checkpoints)
        good = f"{kept[-1].name} is the last good state" if kept else "nothing was saved yet"
        at = f"step {self.step + 1} (pictures {some(names)})"
        return f"{at}: loss {loss}, gradient norm {norm}; {good}; try a lower train.lr"


def turn_on_checkpointing(denoiser: Any) -> None:
    """Have a Diffusers model compute activations again in backward. ConfigError for one that cannot."""
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise ConfigError(f"train.checkpointing: {type(denoiser).__name__} cannot; leave it off")
    denoiser.enable_gradient_checkpointing()
