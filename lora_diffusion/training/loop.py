"""The training loop: a frozen backbone, fresh slots, one small file out.

    style.toml -> TrainConfig -> pictures, captions -> cached latents and embeddings -> batches
    -> family.predict(4-bit denoiser with slots) -> step -> Adapter -> adapter.safetensors

Interrupted, the same call goes on from the last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from lora_diffusion.errors import ConfigError, LoraDiffusionError, in_lines
from lora_diffusion.families import Family, family_of
from lora_diffusion.pipelines import Opened, load_pipeline
from lora_diffusion.quantize import fingerprint
from lora_diffusion.training.adapting import attach_for, check_adapter, encoders_for, format_for, words_for
from lora_diffusion.training.averaging import Average
from lora_diffusion.training.board import Board, check_board
from lora_diffusion.training.checkpoints import (
    Checkpoint,
    check_settings,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
    writing,
)
from lora_diffusion.training.config import TrainConfig, default_settings
from lora_diffusion.training.continuing import continue_from
from lora_diffusion.training.diverging import diverged
from lora_diffusion.training.finishing import finish, save_state
from lora_diffusion.training.interruption import Interruption
from lora_diffusion.training.judging import Judge, mean
from lora_diffusion.training.optimizers import averaged, check_optimizer, optimizer_for, rate_of, restore, state_of
from lora_diffusion.training.preparation import Prepared, prepare
from lora_diffusion.training.processes import Processes
from lora_diffusion.training.rates import rate
from lora_diffusion.training.recipes import steps_for
from lora_diffusion.training.results import Listener, Progress, TrainResult
from lora_diffusion.training.sections import WatchConfig
from lora_diffusion.training.trained import Trained
from lora_diffusion.training.watching import Painter

SHOWN_BATCHES = 8  # what a start from the data is taken from
_FREE = frozenset(  # may change on resuming; of `init_from` the content is compared
    {"train.checkpoint_every", "train.checkpointing", "train.recompute", "output", "name", "data.skip_bad"}
    | {"adapter.init_from"}
    | {f"watch.{name}" for name in WatchConfig.model_fields}
)


def train(config: TrainConfig, listen: Listener = lambda progress: None) -> TrainResult:
    """Train the adapter that `config` describes. Raises LoraDiffusionError subclasses, each with one sentence."""
    check_optimizer(config)
    check_board(config)
    with writing(config.output):
        return _trained(config, listen)


def _trained(config: TrainConfig, listen: Listener) -> TrainResult:
    processes = Processes(config.backbone.device)
    opened = load_pipeline(
        config.base,
        precision=config.backbone.precision,
        compute=config.backbone.compute,
        device=str(processes.device) if processes.count > 1 else config.backbone.device,
        text_encoders=config.backbone.text_encoders,
        keep_adaln=config.backbone.keep_adaln,
    )
    family = family_of(opened.pipe)
    check_adapter(config.adapter, getattr(opened.pipe, family.denoiser))
    prepared = prepare(config, opened, family, lambda done, total: listen(Progress("prepare", done, total)))
    if faults := list(prepared.skipped.values()):
        listen(Progress("note", 0, 0, said=f"data.skip_bad: {len(faults)} left out:{in_lines(faults, len(faults))}"))
    run = Run(_settled(config, prepared, processes), opened, family, prepared, processes)
    if run.resumed:
        listen(Progress("note", 0, 0, said=run.resumed))
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
        self.judge = Judge(config, opened, family, prepared)
        self.data, self.heldout = prepared.training, prepared.heldout
        if config.watch.measure_every and not self.heldout.items:
            raise ConfigError("watch.measure_every measures on held-out pictures, and data.heldout leaves none")
        self.prepared = prepared
        self.before = fingerprint(self.denoiser)
        self.trained = self.judge.trained = self._attach()
        self.start = self._begin()
        if config.train.checkpointing:
            turn_on_checkpointing(self.denoiser)
        if config.train.compile:
            self.denoiser.compile()
        self.format = format_for(self.trained, config.adapter.format)
        self.optimizer = optimizer_for(config.train, self.trained.groups(config))
        self.average = None if config.train.ema is None else Average(self.trained, config.train.ema)
        self.step, self.losses, self.measured = 0, list[float](), list[tuple[int, float]]()
        self.norm = math.nan  # of the last step's gradients, before clipping
        parts = ("vae",) if config.text.live else ("vae", *family.text_encoders)
        self.painter = Painter(config, opened.pipe, parts, opened.device)
        self.checkpoints = config.output / "checkpoints"
        self.resumed = self._resume()

    def go(self, listen: Listener) -> TrainResult:
        """Train to the end or to an interruption."""
        total = self.config.train.steps
        on = self.config.watch.tensorboard and self.processes.index == 0 and self.step < total
        with Board(self.config.output / "tensorboard", self.step, on=on) as self.board:
            seconds = self._train(total, listen)
            if self.step < total:
                return self._stopped(seconds)
            with self._averaged():
                return finish(self, seconds, listen)

    def _train(self, total: int, listen: Listener) -> float:
        """The steps that are left, and the seconds that they took."""
        start = time.monotonic()
        with Interruption() as interruption:
            while self.step < total and not interruption.asked:
                self.losses.append(self._one_step())
                self.step += 1
                rate_now = rate_of(self.optimizer)
                said = {"loss/training": self.losses[-1], "rate": rate_now, "gradient norm": self.norm}
                self.board.points(self.step, said)
                listen(Progress("train", self.step, total, self.losses[-1], rate_now))
                self._watch()
                if self.step % self.config.train.checkpoint_every == 0 or self.step == total or interruption.asked:
                    self._save()
        return time.monotonic() - start

    def _attach(self) -> Trained:
        def show() -> None:
            for index in range(SHOWN_BATCHES):
                next(self.judge.parts(self.data.draw(index), index))

        denoiser = attach_for(self.config, self.denoiser, self.family.denoiser, show)
        told = self.config, self.opened.pipe, self.family
        try:
            words = words_for(*told, self.data.texts)  # before encoders are wrapped, whose tables it lengthens
            return Trained(denoiser, encoders_for(*told), words)
        except LoraDiffusionError:
            denoiser.detach()
            raise

    def _begin(self) -> str | None:
        """The content hash of the file that is gone on from."""
        path = self.config.adapter.init_from
        try:
            return None if path is None else continue_from(path, self.trained)
        except LoraDiffusionError:
            self.trained.detach()
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
            for loss in self.judge.parts(batch, index):
                (loss / settings.accumulate).backward()
                total += loss.item() / settings.accumulate
            names += batch.names
        if course := self.trained.course:
            course.penalty().backward()
        total = self.processes.mean(total)
        self.processes.average_gradients(self.trained.parameters())
        self.norm = nn.utils.clip_grad_norm_(self.trained.parameters(), settings.clip).item()
        if not (math.isfinite(total) and math.isfinite(self.norm)):
            raise diverged(self, total, self.norm, names)
        self.optimizer.step()
        if course:
            course.after(self.step + 1)
        if self.config.adapter.max_norm is not None:
            self.trained.cap(self.config.adapter.max_norm)
        if self.average:
            self.average.update(self.step + 1)
        return total

    def _averaged(self) -> AbstractContextManager[None]:
        return averaged(self.optimizer, self.trained, self.config.adapter.max_norm)

    def _watch(self) -> None:
        """Measure and draw, at the steps for it."""
        watch = self.config.watch
        if any(every and self.step % every == 0 for every in (watch.measure_every, watch.every)):
            with self._averaged():
                self._look()

    def _look(self) -> None:
        watch = self.config.watch
        if watch.measure_every and self.step % watch.measure_every == 0:
            loss = mean(self.judge.bands(self.heldout))
            if loss < min((before for _, before in self.measured), default=math.inf):
                save_state(self, f"{self.config.name}-best", loss)
            self.measured.append((self.step, loss))
            self.board.points(self.step, {"loss/heldout": loss})
        if watch.every and self.step % watch.every == 0 and self.processes.index == 0:
            self.board.picture(self.step, self.painter.at_step(self.trained, self.step))

    def _save(self) -> None:
        self.board.flush()
        if self.processes.index == 0:
            state, average = state_of(self.optimizer), self.average.tensors if self.average else {}
            held = self.trained.state()
            whole = Checkpoint(self.step, held, state, self._settings(), self.losses, average, self.measured)
            save_checkpoint(self.checkpoints, whole)
        self.processes.wait()

    def _resume(self) -> str:
        """Go on from the last checkpoint; what there is to say of that."""
        found = find_checkpoints(self.checkpoints)
        if not found:
            return ""
        checkpoint = load_checkpoint(found[-1])
        changed = check_settings(checkpoint.settings, self._settings(), _FREE, found[-1], default_settings())
        self.trained.restore(checkpoint.parameters)
        if self.average:
            self.average.restore(checkpoint.average)
        restore(self.optimizer, checkpoint.optimizer)
        self.step, self.losses, self.measured = checkpoint.step, checkpoint.losses, checkpoint.measured
        return f"goes on from {found[-1].name}" + (f"; changed since: {'; '.join(changed)}" if changed else "")

    def _settings(self) -> dict[str, Any]:
        made_of = {"pictures": self.prepared.digest, "backbone": self.before, "start": self.start}
        return self.config.model_dump(mode="json") | made_of

    def _stopped(self, seconds: float) -> TrainResult:
        self.trained.detach()
        unchanged = fingerprint(self.denoiser) == self.before
        return TrainResult(None, self.step, seconds, self.losses, backbone_unchanged=unchanged)


def turn_on_checkpointing(denoiser: Any) -> None:
    """Have a Diffusers model compute activations again in backward. ConfigError for one that cannot."""
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise ConfigError(f"train.checkpointing: {type(denoiser).__name__} cannot; leave it off")
    denoiser.enable_gradient_checkpointing()
