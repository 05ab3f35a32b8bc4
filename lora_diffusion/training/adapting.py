"""The trainable slots of a run as its configuration says (method, ranks, start, dropout), and their file format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.attachment import Attachment, attach, by_layer
from lora_diffusion.beginning import eva_start, loftq_start
from lora_diffusion.dropping import Dropping
from lora_diffusion.errors import AdapterFileError, ConfigError, some
from lora_diffusion.families import Family
from lora_diffusion.formats import FORMATS
from lora_diffusion.methods import Method, new_method
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.pipelines import folder_of, present
from lora_diffusion.quantize import WeightFiles
from lora_diffusion.targets import find_targets
from lora_diffusion.training.batches import generator_for
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.continuing import check_start
from lora_diffusion.training.sections import AdapterConfig
from lora_diffusion.training.trained import Trained
from lora_diffusion.training.words import Words, check_captions, encoders_for_words

_BY_OTHERS = ("loftq", "eva")  # starts that need more than the layer


def check_adapter(settings: AdapterConfig, denoiser: nn.Module) -> None:
    """What `attach_for` would refuse of method, targets and ranks, before pictures are encoded. Changes nothing."""
    method = _method(settings)
    if settings.targets != []:
        by_layer(method, find_targets(denoiser, settings.targets), settings.ranks, settings.alphas)


def _method(settings: AdapterConfig) -> Method:
    check_start(settings)
    named: dict[str, Any] = {"rank": settings.rank, "alpha": settings.alpha, "rslora": settings.rslora}
    init = None if settings.init in _BY_OTHERS else settings.init
    return new_method(settings.method, settings.settings, **named, init=init, freeze_down=settings.freeze_down)


def attach_for(config: TrainConfig, denoiser: nn.Module, component: str, run: Callable[[], object]) -> Attachment:
    """Slots in training mode, none for no targets. `run` shows the denoiser a few batches, for starts from the data.

    ConfigError for settings that the method does not know.
    """
    settings, method = config.adapter, _method(config.adapter)
    if settings.targets == []:
        attachment = Attachment(denoiser, component, {}, {}, {})
        denoiser.requires_grad_(False)
        return attachment
    attachment = attach(
        denoiser,
        method,
        settings.targets,
        component=component,
        dropout=Dropping(settings.dropout, settings.rank_dropout, settings.module_dropout, settings.nested),
        ranks=settings.ranks,
        alphas=settings.alphas,
        fresh=_starts(config, method, denoiser, component, run) if settings.init in _BY_OTHERS else None,
        generator=generator_for(config.train.seed, "init"),
    )
    try:
        if settings.max_norm is not None and not attachment.has_cap:
            who = f"{settings.method!r} with init {settings.init!r}"
            raise ConfigError(f"adapter.max_norm is for pairs that start at 0, not for {who}")
        attachment.begin(method, config.train.steps)
    except ConfigError:
        attachment.detach()
        raise
    for slot in attachment.slots.values():
        slot.train()
    return attachment


def encoders_for(config: TrainConfig, pipe: Any, family: Family) -> list[Attachment]:
    """Slots in training mode on the text encoders that are to be trained. ConfigError for one that is not there."""
    text, settings = config.text, config.adapter
    there = present(pipe, family.text_encoders)
    if absent := [name for name in text.train if name not in there]:
        raise ConfigError(f"text.train: there is no {some(absent)} to train; {config.base} has {some(there)}")
    attachments: list[Attachment] = []
    for name in dict.fromkeys(text.train):
        rank, alpha = text.rank or settings.rank, settings.alpha if text.alpha is None else text.alpha
        method = new_method(settings.method, settings.settings, rank=rank, alpha=alpha, rslora=settings.rslora)
        generator = generator_for(config.train.seed, "init", name)
        made = attach(
            getattr(pipe, name),
            method,
            text.targets,
            component=name,
            dropout=Dropping(settings.dropout, settings.rank_dropout, settings.module_dropout, settings.nested),
            generator=generator,
        )
        made.begin(method, config.train.steps)
        attachments.append(made)
    return attachments


def words_for(config: TrainConfig, pipe: Any, family: Family, texts: Sequence[str]) -> Words | None:
    """New tokens as they begin. ConfigError for one that no caption holds, AdapterMismatchError for a known one."""
    text = config.text
    if not text.tokens:
        return None
    check_captions(text.tokens, texts)
    encoders = encoders_for_words(pipe, family.text_encoders)
    return Words(pipe, encoders, text.tokens, text.token_vectors, config.train.seed)


def format_for(attachment: Attachment | Trained, wanted: str | None) -> str:
    """The format to save in, tried before the first step is made: AdapterFileError if none can say the method."""
    adapter = attachment.adapter("trial")
    last, *others = [wanted] if wanted else ["kohya", "diffusers"] if len(adapter) else ["embedding"]
    for name in (*others, last, *(() if wanted else FORMATS)):
        try:
            FORMATS[name].dump(adapter)
        except AdapterFileError:
            continue
        return name
    FORMATS[last].dump(adapter)
    return last


def _starts(
    config: TrainConfig, method: object, denoiser: nn.Module, component: str, run: Callable[[], object]
) -> dict[str, LayerAdapter]:
    settings: AdapterConfig = config.adapter
    if not isinstance(method, LoRA):
        raise ConfigError(f"adapter.init = {settings.init!r} is a start of method 'lora', not of {settings.method!r}")
    layers = find_targets(denoiser, settings.targets)
    found = by_layer(method, layers, settings.ranks, settings.alphas)
    methods = {name: chosen for name, chosen in found.items() if isinstance(chosen, LoRA)}
    if settings.init == "eva":
        return eva_start(layers, methods, run)
    return loftq_start(layers, methods, WeightFiles(folder_of(config.base) / component))
