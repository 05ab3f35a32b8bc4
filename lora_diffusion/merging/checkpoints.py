"""The weights of a tuned model, whatever it lies in: a pipeline, a Diffusers folder, or a checkpoint in one file.

A checkpoint has its tool's own tensor names and shapes; Diffusers' converters bring them to those of the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_diffusion.adapter import DENOISERS
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.pipelines import quiet
from lora_diffusion.quantize import WeightFiles

Weights = Mapping[str, Tensor]


def components_of(model: Any, base: Any = None) -> dict[str, Weights]:
    """Denoiser and text encoders: component -> tensor name -> tensor, read when asked for from a folder.

    A `.safetensors` checkpoint is opened as a model of `base`, a Diffusers folder, and is in memory once, in its own
    dtype; of one without text encoders the denoiser alone. ConfigError for what cannot be read, AdapterMismatchError
    for a checkpoint of another architecture.
    """
    if isinstance(model, str | Path):
        path = Path(model).expanduser()
        return _checkpoint(path, base) if path.suffix == ".safetensors" else _folders(path)
    parts = getattr(model, "components", None)
    if not isinstance(parts, dict):
        raise ConfigError(
            f"extract: {type(model).__name__} is no pipeline, Diffusers folder or .safetensors checkpoint"
        )
    return _states(parts)


def _states(parts: Mapping[str, Any]) -> dict[str, Weights]:
    return {n: part.state_dict() for n, part in parts.items() if isinstance(part, nn.Module) and _is_adapted(n)}


def _folders(folder: Path) -> dict[str, Weights]:
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is no Diffusers folder: there is no model_index.json in it")
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and _is_adapted(path.name))
    return {path.name: WeightFiles(path) for path in inside}


def _checkpoint(path: Path, base: Any) -> dict[str, Weights]:
    folder = Path(base).expanduser() if isinstance(base, str | Path) else None
    if folder is None or not (folder / "model_index.json").is_file():
        raise ConfigError(f"{path} is a checkpoint: to read it, the base must be a Diffusers folder of its kind")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    how = {"config": str(folder), "local_files_only": True, "torch_dtype": _dtype(path)}
    with quiet():
        import diffusers
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        denoiser = next((name for name in DENOISERS if name in index), None)
        if denoiser is None:
            raise ConfigError(f"{folder} has no {' or '.join(DENOISERS)}; expected the base of a diffusion model")
        try:
            try:
                return _states(getattr(diffusers, index["_class_name"]).from_single_file(str(path), **how).components)
            except SingleFileComponentError:  # no text encoder or no VAE in it
                model = getattr(diffusers, index[denoiser][1])
                return _states({denoiser: model.from_single_file(str(path), subfolder=denoiser, **how)})
        except (KeyError, ValueError, RuntimeError, AttributeError, OSError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise AdapterMismatchError(
                f"{path} cannot be read as a {index['_class_name']} like {folder}: {reason}"
            ) from None


def _dtype(path: Path) -> torch.dtype:
    """The dtype of the checkpoint's first tensor with floating-point numbers."""
    try:
        with safe_open(path, framework="pt") as file:
            names = (key for key in file.keys() if file.get_slice(key).get_shape())  # noqa: SIM118, it is no dict
            found = (file.get_slice(key)[:0].dtype for key in names)
            return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as model weights: {error}") from None


def _is_adapted(component: str) -> bool:
    return component in DENOISERS or component.startswith("text_encoder")
