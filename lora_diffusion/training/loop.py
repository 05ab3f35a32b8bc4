"""The training loop: a frozen backbone, fresh slots, one small file out.

    style.toml -> TrainConfig -> pictures, captions -> cached latents and embeddings -> batches
    -> family.predict(4-bit denoiser with slots) -> step -> Adapter -> adapter.safetensors

Interrupted, the same call goes on from the last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import Adapter
from lora_diffusion.attachment import Attachment
from lora_diffusion.errors import ConfigError, LoraDiffusionError, some
from lora_diffusion.families import Family, family_of
from lora_diffusion.formats.files import save_adapter
from lora_diffusion.pipelines import DTYPES, Opened, load_pipeline
from lora_diffusion.quantize import QuantizationReport, fingerprint
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
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.interruption import Interruption
from lora_diffusion.training.loss import MSE, Loss, loss_for
from lora_diffusion.training.objective import Objective, losses, objective_for
from lora_diffusion.training.preparation import Prepared, prepare
from lora_diffusion.training.processes import Processes
from lora_diffusion.training.rates import rate

SHOWN_BATCHES = 8  # what a start from the data is taken from
HELDOUT_BANDS = 8  # fixed times at which each held-out picture is measured
_FREE = frozenset(
    {"train.checkpoint_every", "train.checkpointing", "output", "name", "data.skip_bad"}
)  # may change on resuming


class DivergedError(LoraDiffusionError, ArithmeticError):
    """The loss or the gradients are no numbers any more."""


@dataclass(frozen=True)
class Progress:
    """What a caller is told after each step. `stage` is "prepare", "measure" or "train"."""

    stage: str
    done: int
    total: int
    loss: float = math.nan


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class TrainResult:
    """What came out. Losses are mean squared errors at fixed noise and times over the held-out pictures."""

    adapter: Path | None  # None when interrupted
    steps: int
    seconds: float
    losses: list[float] = field(repr=False)
    heldout_base: float = math.nan
    heldout_adapter: float = math.nan
    backbone_unchanged: bool = True
    parameters: int = 0
    report: QuantizationReport | None = field(default=None, repr=False)

    @property
    def interrupted(self) -> bool:
        """Whether it stopped early; the same call goes on."""
        return self.adapter is None


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
    run = Run(config, opened, family, prepared, processes)
    return run.go(listen)


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
        self.attachment = self._attach()
        if config.train.checkpointing:
            turn_on_checkpointing(self.denoiser)
        self.format = format_for(self.attachment, config.adapter.format)
        groups = self.attachment.groups(config.train.lr, config.train.up_ratio)
        self.optimizer = torch.optim.AdamW(groups, lr=config.train.lr, weight_decay=config.train.weight_decay)
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
        return self._finish(seconds, listen) if self.step >= total else self._stopped(seconds)

    def _attach(self) -> Attachment:
        def show() -> None:
            for index in range(SHOWN_BATCHES):
                self._loss(self.data.draw(index), index)

        return attach_for(self.config, self.denoiser, self.family.denoiser, show)

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
        self.attachment.at(times if self.objective.schedule is None else times / len(self.objective.schedule[0]))
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
            state, average = self.optimizer.state_dict(), self.average.tensors if self.average else {}
            adapter = self.attachment.state()
            whole = Checkpoint(self.step, adapter, state, self._settings(), self.losses, average)
            save_checkpoint(self.checkpoints, whole)
        self.processes.wait()

    def _resume(self) -> None:
        found = find_checkpoints(self.checkpoints)
        if not found:
            return
        checkpoint = load_checkpoint(found[-1])
        check_settings(checkpoint.settings, self._settings(), _FREE, found[-1])
        self.attachment.restore(checkpoint.parameters)
        if self.average:
            self.average.restore(checkpoint.average)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step, self.losses = checkpoint.step, checkpoint.losses

    def _settings(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json"), "pictures": self.prepared.digest, "backbone": self.before}

    def _finish(self, seconds: float, listen: Listener) -> TrainResult:
        name, cap = self.config.name, self.config.adapter.max_norm
        beside = self.average is not None and self.config.train.ema_saved == "beside"
        if self.average and not beside:
            self.average.put_in(cap)
        self.attachment.weigh(0.0)
        listen(Progress("measure", 0, 2))
        base = self.measure(self.heldout)
        self.attachment.weigh(1.0)
        listen(Progress("measure", 1, 2))
        made = [self._measured(name)]
        if self.average and beside:
            self.average.put_in(cap)
            made.append(self._measured(f"{name}-ema"))
        listen(Progress("measure", 2, 2))
        self.attachment.detach()
        unchanged = fingerprint(self.denoiser) == self.before
        if self.processes.index == 0:
            for adapter, loss in made:
                path, said = self._path(adapter), self._metadata(adapter.name, base, loss)
                save_adapter(adapter, path, format=self.format, overwrite=True, metadata=said)
        self.processes.wait()
        (adapter, trained), report = made[0], self.opened.report
        return TrainResult(
            self._path(adapter), self.step, seconds, self.losses, base, trained, unchanged, adapter.parameters, report
        )

    def _measured(self, name: str) -> tuple[Adapter, float]:
        """The adapter as it is now, and its held-out loss."""
        loss = self.measure(self.heldout)
        return self.attachment.adapter(name, dtype=DTYPES[self.config.adapter.save_dtype]), loss

    def _path(self, adapter: Adapter) -> Path:
        return self.config.output / f"{adapter.name}.safetensors"

    def _stopped(self, seconds: float) -> TrainResult:
        self.attachment.detach()
        unchanged = fingerprint(self.denoiser) == self.before
        return TrainResult(None, self.step, seconds, self.losses, backbone_unchanged=unchanged)

    def _metadata(self, title: str, base: float, trained: float) -> dict[str, str]:
        config = self.config.model_dump(mode="json", exclude={"output", "base"})
        facts = {
            "base": Path(self.config.base).name,
            "base_precision": self.config.backbone.precision,
            "base_sha256": self.before,
            "family": self.family.name,
            "heldout_loss_base": base,
            "heldout_loss_adapter": trained,
            "pictures": len(self.data.items),
            "settings": {**config, "data": {"resolution": self.config.data.resolution}},
        }
        return {
            "lora_diffusion": json.dumps(facts, sort_keys=True),
            "modelspec.title": title,
            "modelspec.trigger_phrase": self.config.data.trigger,
        }

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
