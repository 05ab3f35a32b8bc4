"""A pipeline without weights, on the meta device, from its folder or from the small files of one on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.families.skeletons import skeleton_of
from lora_diffusion.pipelines import quiet

__all__ = ["cast", "empty_pipeline", "small_files"]


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """To a dtype and to eval mode, without what Diffusers says to that."""
    with quiet():  # Diffusers warns of modules that are better kept in float32, and lists none
        model.to(dtype).eval()


def empty_pipeline(folder: Path) -> Any:
    """The pipeline of a folder, its models on the meta device. ConfigError for one that cannot be opened."""
    models = skeleton_of(folder)
    with quiet():
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(folder, **models)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"base {str(folder)!r} cannot be opened: {str(error).splitlines()[0]}") from None
    for model in models.values():
        model.requires_grad_(False).eval()
    return pipe


def small_files(base: str) -> Path:
    """A local folder, or the hub's small files (no weights) of a repository."""
    folder = Path(base).expanduser()
    if folder.exists() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"base {base!r} is no folder here and cannot be looked up: {reason}") from None
