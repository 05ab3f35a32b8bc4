"""Weights of single layers, read from a pipeline folder into models that have none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.fitting import Site
from lora_diffusion.layers import submodule
from lora_diffusion.quantize.streaming import WeightFiles


def read_weights(models: Mapping[str, nn.Module], folder: str | Path, sites: Iterable[Site]) -> None:
    """Give these layers (component, name) of meta models their weights; those the folder's files lack stay without.

    A layer at a time is read. What a component's folder cannot say, such as one without weight files, is left out.
    """
    files: dict[str, Mapping[str, Tensor]] = {}
    for component, name in sites:
        if component not in files:
            files[component] = _files(Path(folder) / component)
        key = next((key for key in (f"{name}.weight", f"text_model.{name}.weight") if key in files[component]), None)
        if key is not None:
            layer = submodule(models[component], name)
            layer.weight = nn.Parameter(files[component][key], requires_grad=False)


def _files(folder: Path) -> Mapping[str, Tensor]:
    try:
        return WeightFiles(folder)
    except ConfigError:
        return {}
