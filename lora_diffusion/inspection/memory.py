"""What a training run will take, before it starts: memory by component, from layer shapes on the meta device.

full     every weight of the denoiser trained, weights, gradients and both AdamW moments in the compute dtype
LoRA     the frozen denoiser in the compute dtype, the adapter in float32
QLoRA    the frozen denoiser in NF4, the adapter in float32 (Dettmers et al. 2023, arXiv 2305.14314)

One training step of each is rehearsed (`rehearsal.py`); no weights are read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_diffusion.attachment import attach
from lora_diffusion.errors import ConfigError
from lora_diffusion.families import Family, family_of
from lora_diffusion.inspection.emptied import cast, empty_pipeline, small_files
from lora_diffusion.inspection.rehearsal import Rehearsal, put_words_in
from lora_diffusion.methods import new_method
from lora_diffusion.pipelines import DTYPES, pick_device, present, quantize_encoders, quiet
from lora_diffusion.quantize import QuantizationReport, quantize, weight_bytes
from lora_diffusion.sizes import GIB
from lora_diffusion.training.adapting import encoders_for
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.judging import keeping_less
from lora_diffusion.training.loop import turn_on_checkpointing
from lora_diffusion.training.objective import losses, objective_for
from lora_diffusion.training.optimizers import optimizer_bytes
from lora_diffusion.training.sections import TextConfig
from lora_diffusion.training.words import encoders_for_words

__all__ = ["Cost", "MemoryPlan", "encoding_with", "plan_memory", "ways_to_fit"]

CAPTION = " word" * 60  # where the cost depends on the length of captions
RESERVE = 0.6 * GIB  # CUDA's context and the allocator's gaps, on a GPU with nothing else on it


@dataclass(frozen=True)
class Cost:
    """Bytes by component at the peak of a training step. `activations` are all that lives in between as well."""

    name: str
    trained: int  # parameters
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    average: int = 0  # of the adapter, where `train.ema` is set

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.average


@dataclass(frozen=True)
class MemoryPlan:
    """Costs side by side, and what encoding takes before. `this_run` is the column that the settings stand for."""

    denoiser: str
    parameters: int
    dtype: str
    columns: tuple[Cost, ...]
    this_run: Cost
    waiting: int  # bytes of the denoiser alone
    encoding: int  # bytes at its peak: VAE, text encoders and the waiting denoiser
    report: QuantizationReport | None = None  # what becomes of each layer; None where none is quantised

    @property
    def peak(self) -> int:
        """Of the run as it is configured."""
        return max(self.this_run.peak, self.encoding)


def plan_memory(config: TrainConfig, *, gpu: bool | None = None) -> MemoryPlan:
    """Rehearse `config` without its weights. `gpu`: plan for one (None: if there is one here).

    ConfigError where the base is no pipeline folder, nor in the hub's cache.
    """
    stage = _Stage(config, _on_gpu(gpu))
    dense = next(name for name, dtype in DTYPES.items() if dtype == stage.dtype)
    columns = [stage.cost("full", config, None), stage.cost("LoRA", config, dense), stage.cost("QLoRA", config, "nf4")]
    if config.backbone.precision == "int8":
        columns.append(stage.cost("LoRA over int8", config, "int8"))
    chosen = {"nf4": columns[2], "int8": columns[-1]}.get(config.backbone.precision, columns[1])
    kind, numbers = type(stage.denoiser).__name__, sum(p.numel() for p in stage.denoiser.parameters())
    report = stage.report if config.backbone.precision not in DTYPES else None
    waiting = chosen.weights - (stage.encoder_bytes() if config.text.live else 0)
    return MemoryPlan(kind, numbers, dense, tuple(columns), chosen, waiting, stage.encoding(waiting), report)


def encoding_with(config: TrainConfig, waiting: int, *, gpu: bool | None = None) -> int:
    """Bytes at the peak of encoding as `config` says, beside a denoiser of `waiting` bytes."""
    return _Stage(config, _on_gpu(gpu)).encoding(waiting)


def ways_to_fit(config: TrainConfig, limit: float, *, gpu: bool | None = None) -> list[tuple[str, Cost]]:
    """What to turn on, one after the other, until the run fits into `limit` bytes: (setting, cost with it).

    Empty where it fits already. Cheapest in quality first; what saves less than 1 % is left out.
    """
    stage = _Stage(config, _on_gpu(gpu))
    cost = stage.cost("", config, config.backbone.precision)
    taken: list[tuple[str, Cost]] = []
    for settings in _savings(config):
        if cost.peak <= limit:
            break
        tried = config.changed(*settings)
        saved = stage.cost("", tried, tried.backbone.precision)
        if saved.peak < 0.99 * cost.peak:
            config, cost = tried, saved
            taken.append((" ".join(settings), cost))
    return taken


def _savings(config: TrainConfig) -> Iterator[tuple[str, ...]]:
    if not config.train.recompute:
        yield ("train.recompute=true",)
    if not config.train.checkpointing:
        yield ("train.checkpointing=true",)
    if config.backbone.precision not in ("nf4", "int8"):
        yield ("backbone.precision=int8",)
    if config.backbone.precision != "nf4":
        yield ("backbone.precision=nf4",)
    if config.train.optimizer == "adamw":
        yield ("train.optimizer=adamw8bit",)
    batch, accumulate = config.train.batch, config.train.accumulate
    if batch > 1:
        yield ("train.batch=1", f"train.accumulate={batch * accumulate}")
    for smaller in (768, 512, 384, 256):
        if smaller < config.data.resolution:
            yield (f"data.resolution={smaller}",)
    for rank in (8, 4):
        if rank < config.adapter.rank:
            yield (f"adapter.rank={rank}",)


class _Stage:
    """A pipeline without weights, and the step that is rehearsed on its denoiser."""

    def __init__(self, config: TrainConfig, gpu: bool) -> None:
        self.pipe = empty_pipeline(small_files(config.base))
        self.family: Family = family_of(self.pipe)
        self.objective = objective_for(self.family, self.pipe.scheduler)
        self.gpu, self.dtype = gpu, _dtype(config, gpu)
        self.denoiser: nn.Module = getattr(self.pipe, self.family.denoiser)
        for part in self._models():
            cast(part, self.dtype)
        if config.backbone.text_encoders is not None:
            quantize_encoders(self.pipe, config.backbone.text_encoders, self.dtype, "meta")
        self.resolution = _largest(config)
        self.report: QuantizationReport | None = None  # of the last denoiser that was quantised
        self._made: dict[tuple[int, int], tuple[Tensor, dict[str, Tensor]]] = {}  # inputs by batch and resolution

    def cost(self, name: str, config: TrainConfig, precision: Any) -> Cost:
        """One training step's cost; without precision all of the denoiser is trained."""
        with torch.device("meta"):
            denoiser: Any = type(self.denoiser).from_config(self.denoiser.config)  # type: ignore[attr-defined]
        cast(denoiser, self.dtype)
        if precision in DTYPES:
            denoiser.requires_grad_(False)
        elif precision is not None:
            told: dict[str, Any] = {"compute_dtype": self.dtype, "device": "meta"}
            self.report = quantize(
                denoiser, precision, keep=self.family.kept, keep_adaln=config.backbone.keep_adaln, **told
            )
        weights = weight_bytes(denoiser)
        trained = list(denoiser.parameters()) if precision is None else _adapter(denoiser, config, self.family)
        live = precision is not None and config.text.live
        with self._encoders_in_training(config if live else None) as more:
            trained += more
            if config.train.checkpointing:
                turn_on_checkpointing(denoiser)
            peak, size = self._rehearse(denoiser, config, live), sum(p.nbytes for p in trained)
            weights += self.encoder_bytes() if live else 0
        peak = max(peak, 2 * size if self.gpu else size)  # on GPUs AdamW works on all parameters at once
        count = sum(p.numel() for p in trained)
        if precision is None:
            return Cost(name, count, weights, 0, size, 2 * size, peak - size)
        average = 0 if config.train.ema is None else size
        held = optimizer_bytes(config.train.optimizer, trained)
        return Cost(name, count, weights, size, size, held, peak - size, average)

    def encoding(self, waiting: int) -> int:
        """Bytes at the peak of encoding one picture and sixteen captions, `waiting` being the denoiser's."""
        others = sum(weight_bytes(part) for part in self._models() if part is not self.denoiser)
        with Rehearsal() as rehearsal, torch.no_grad():
            self._inputs(1, self.resolution)
            self._encoded(16)
        return waiting + others + rehearsal.peak

    @contextmanager
    def _encoders_in_training(self, config: TrainConfig | None) -> Generator[list[nn.Parameter]]:
        """Slots and new tokens on the text encoders that are trained, for the while; their parameters."""
        attachments = encoders_for(config, self.pipe, self.family) if config else []
        for slot in (slot for attachment in attachments for slot in attachment.slots.values()):
            slot.to("meta").train()
        parameters = [parameter for attachment in attachments for parameter in attachment.parameters()]
        words = self._words(config.text) if config and config.text.tokens else []
        try:
            yield parameters + [rows for rows, _ in words]
        finally:
            for attachment in attachments:
                attachment.detach()
            for _, hook in words:
                hook.remove()

    def _words(self, text: TextConfig) -> list[tuple[nn.Parameter, RemovableHandle]]:
        names, count = encoders_for_words(self.pipe, self.family.text_encoders), len(text.tokens) * text.token_vectors
        return [put_words_in(getattr(self.pipe, name).get_input_embeddings(), count) for name in names]

    def encoder_bytes(self) -> int:
        """Of the text encoders' weights."""
        return sum(weight_bytes(getattr(self.pipe, name)) for name in present(self.pipe, self.family.text_encoders))

    def _rehearse(self, denoiser: nn.Module, config: TrainConfig, live: bool) -> int:
        """Bytes at the peak of a step's forward and backward passes, gradients included.

        A second batch or a prior's loss comes when gradients are there already.
        """
        wanted = config.train.batch, _largest(config)
        if wanted not in self._made:
            with Rehearsal(), torch.no_grad():
                self._made[wanted] = self._inputs(*wanted)
        latents, conditioning = self._made[wanted]
        times = self.objective.draw(config.train.batch, torch.Generator())
        passes = 1 + (config.train.accumulate > 1 or config.prior.kind != "none")
        with Rehearsal() as rehearsal:
            noise = torch.empty_like(latents)
            for _ in range(passes):
                with keeping_less(config.train):
                    if live:
                        conditioning = conditioning | self._encoded(config.train.batch)
                    loss = losses(self.family, self.objective, denoiser, latents, conditioning, noise, times).mean()
                loss.backward()
                del loss
        return rehearsal.peak

    def _inputs(self, batch: int, resolution: int) -> tuple[Tensor, dict[str, Tensor]]:
        pictures = torch.empty(batch, 3, resolution, resolution, device="meta")
        try:
            conditioning = self._encoded(batch)
            if self.family.sized:
                conditioning["time_ids"] = torch.empty(batch, 6, device="meta", dtype=self.dtype)
            return self.family.encode_pictures(self.pipe, pictures), conditioning
        except RuntimeError as error:  # what depends on values has none here
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{self.family.name} cannot be planned without its weights: {reason}") from None

    def _encoded(self, batch: int) -> dict[str, Tensor]:
        with quiet():  # a caption that is longer than its encoder takes
            return self.family.encode_prompts(self.pipe, [CAPTION] * batch)

    def _models(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]


def _adapter(denoiser: nn.Module, config: TrainConfig, family: Family) -> list[nn.Parameter]:
    """Fresh slots on the denoiser, as training puts them; their parameters."""
    given = config.adapter
    if given.targets == []:
        return []
    named: dict[str, Any] = {"rank": given.rank, "alpha": given.alpha, "rslora": given.rslora}
    method = new_method(given.method, given.settings, freeze_down=given.freeze_down, **named)
    told: dict[str, Any] = {"dropout": given.dropout, "ranks": given.ranks, "alphas": given.alphas}
    attachment = attach(denoiser, method, given.targets, component=family.denoiser, **told)
    for slot in attachment.slots.values():
        slot.to("meta").train()
    return attachment.parameters()


def _largest(config: TrainConfig) -> int:
    return max(config.data.resolution, *config.data.resolutions, 0)


def _dtype(config: TrainConfig, gpu: bool) -> torch.dtype:
    compute, precision = config.backbone.compute, config.backbone.precision
    if compute == "auto":
        return DTYPES.get(precision, torch.bfloat16 if gpu else torch.float32)
    return DTYPES[compute]


def _on_gpu(gpu: bool | None) -> bool:
    return pick_device("auto").type != "cpu" if gpu is None else gpu
