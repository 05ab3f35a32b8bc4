"""A new run that begins where a file ends: monthly refreshes of one adapter with new pictures or settings.

Unlike resuming, nothing of the earlier run is taken over but its tensors; the optimiser starts afresh.
"""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.attachment import Attachment
from lora_diffusion.errors import AdapterMismatchError, ConfigError, some
from lora_diffusion.fitting import fit
from lora_diffusion.formats.files import load_adapter
from lora_diffusion.training.sections import AdapterConfig
from lora_diffusion.training.trained import Trained


def check_start(settings: AdapterConfig) -> None:
    """ConfigError where a run is told two beginnings."""
    if settings.init_from is not None and settings.init is not None:
        raise ConfigError(
            f"adapter.init_from begins with the tensors of a file, adapter.init = {settings.init!r} with others;"
            " leave one out"
        )


def continue_from(path: Path, trained: Trained) -> str:
    """Copy the file's tensors into fresh slots, names in any spelling; its content hash.

    AdapterMismatchError unless it has the same layers as the run, each with the same method, shapes and alpha, and
    the same tokens.
    """
    adapter, attachments = load_adapter(path), trained.attachments
    models = {attachment.component: attachment.model for attachment in attachments}
    if others := sorted({*adapter.layers} - models.keys()):
        raise AdapterMismatchError(f"{path} has layers of {some(others)}, and this run trains {some(sorted(models))}")
    found = fit(adapter, models)
    found.check(adapter, models)
    placed: dict[str, dict[str, LayerAdapter]] = {}
    for (component, name), layer in found.layers.items():
        placed.setdefault(component, {})[name] = layer
    for attachment in attachments:
        _check_alphas(path, placed.get(attachment.component, {}), attachment)
        attachment.load(Adapter(adapter.name, placed))
    if trained.words:
        trained.words.load(adapter.embeddings, str(path))
    elif adapter.embeddings:
        raise AdapterMismatchError(
            f"{path} has the tokens {some(sorted(adapter.embeddings))}; name them in text.tokens"
        )
    return adapter.content_hash


def _check_alphas(path: Path, theirs: dict[str, LayerAdapter], attachment: Attachment) -> None:
    """Method, rank and alpha; what else there is, `Attachment.load` compares."""
    ours = attachment.adapter("fresh").layers[attachment.component]
    for name in ours.keys() & theirs.keys():
        if _summary(ours[name]) != _summary(theirs[name]):
            raise AdapterMismatchError(
                f"{path}: {attachment.component} {name} is {_summary(theirs[name])}, and this run trains"
                f" {_summary(ours[name])}; set adapter.method, adapter.rank and adapter.alpha as the file has them"
            )


def _summary(layer: LayerAdapter) -> str:
    rank = f" of rank {len(layer.tensors['down'])}" if "down" in layer.tensors else ""
    return f"{layer.method}{rank}" + ("" if layer.alpha is None else f" with alpha {float(layer.alpha):g}")
