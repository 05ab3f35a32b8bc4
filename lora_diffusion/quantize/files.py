"""A quantised model on disk: one safetensors file that gives every byte back, 4-bit constants included."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_diffusion.drafts import whole_file
from lora_diffusion.errors import ConfigError, some
from lora_diffusion.quantize.contents import frozen_modules, tie, ties
from lora_diffusion.quantize.int8 import Int8Linear
from lora_diffusion.quantize.layers import four_bit_from_bytes, is_four_bit
from lora_diffusion.quantize.plan import DTYPES, Fate
from lora_diffusion.quantize.report import QuantizationReport
from lora_diffusion.quantize.walk import checked_device, report_on

__all__ = ["FILE_NAME", "load_quantized", "save_quantized", "saved_as"]

FILE_NAME = "quantized.safetensors"
_LAYERS = "lora_diffusion_layers"  # metadata key: layer -> how it is stored


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write `model` to `folder`/quantized.safetensors and return that path. Adapters on the model are left out.

    The file appears under its name only when it is complete.
    """
    stored = {name: _stored(module) for name, module in frozen_modules(model) if isinstance(module, nn.Linear)}
    metadata = {_LAYERS: json.dumps({name: how for name, how in stored.items() if how})}
    tensors: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in model.state_dict().items():
        if "adapters" in name.split("."):
            continue
        shared = tensor.data_ptr() in addresses  # safetensors takes no two names for one memory
        addresses.add(tensor.data_ptr())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        save_file(tensors, draft, metadata=metadata)
    return path


@torch.no_grad()
def load_quantized(
    model: nn.Module, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> QuantizationReport:
    """Put the file that `save_quantized` wrote to `folder` into `model`, bit for bit, and freeze it.

    `model` is a fresh model of the same configuration, its parameters on the meta device or not. Raises ConfigError
    for a missing or broken file and for one that belongs to another model.
    """
    where = checked_device(device)
    path = Path(folder) / FILE_NAME
    with _opened(path, where) as (file, layers):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    _check_fits(model, layers, tensors, path)
    for name, how in layers.items():
        model.set_submodule(name, _layer_from(model.get_submodule(name), how, _pop_below(tensors, name), where))
    pairs = ties(model)
    model.load_state_dict(tensors, strict=False, assign=True)
    tie(model, pairs)
    for module in model.modules():  # those that no file holds, because modules compute them
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(where))
    model.requires_grad_(requires_grad=False)
    fates = {name: Fate("kept", "as it was saved") for name in layers}
    return report_on(model, "as saved", fates)


def saved_as(folder: str | os.PathLike[str]) -> tuple[str, torch.dtype] | None:
    """(precision, dtype that it computes in) of the model that `save_quantized` wrote to `folder`; None without one.

    ConfigError for a broken file.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    with _opened(path, torch.device("cpu")) as (file, layers):
        names = (name for name in file.keys() if _home(name, layers) is None)  # noqa: SIM118
        kept = (file.get_tensor(name).dtype for name in names)
        dtype = next((dtype for dtype in kept if dtype.is_floating_point), torch.bfloat16)
    computes = [getattr(torch, how["compute_dtype"]) for how in layers.values() if "compute_dtype" in how]
    stored = {how["stored"] for how in layers.values()}
    small = next((kind for kind in ("nf4", "int8") if kind in stored), None)
    return small or next(name for name, one in DTYPES.items() if one == dtype), computes[0] if computes else dtype


@contextmanager
def _opened(path: Path, device: torch.device) -> Generator[tuple[Any, dict[str, dict[str, str]]]]:
    """The open file, and layer -> how it is stored."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            layers = json.loads((file.metadata() or {}).get(_LAYERS, "null"))
            if layers is None:
                raise ConfigError(f"{path}: holds no quantised model; expected a file written by save_quantized")
            yield file, layers
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as a quantised model: {error}") from error


def _stored(module: nn.Module) -> dict[str, str]:
    if isinstance(module, Int8Linear):
        return {"stored": "int8"}
    if is_four_bit(module):
        compute: Any = module
        return {"stored": "nf4", "compute_dtype": str(compute.compute_dtype).removeprefix("torch.")}
    return {}


def _check_fits(
    model: nn.Module, layers: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor], path: Path
) -> None:
    linear = {name for name, module in frozen_modules(model) if isinstance(module, nn.Linear)}
    expected = {name for name in model.state_dict() if "adapters" not in name.split(".")}
    extra = set(layers) - linear | {name for name in tensors if not _home(name, layers)} - expected
    missing = expected - set(tensors)
    if extra or missing:
        found = f"it has {some(sorted(extra))} too much" if extra else f"it lacks {some(sorted(missing))}"
        raise ConfigError(f"{path}: belongs to another model: {found}")


def _home(name: str, layers: Mapping[str, Mapping[str, str]]) -> str | None:
    """The quantised layer that the tensor called `name` belongs to."""
    parts = name.split(".")
    return next((home for n in range(len(parts), 0, -1) if (home := ".".join(parts[:n])) in layers), None)


def _pop_below(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(f"{layer}.")]
    return {name.removeprefix(f"{layer}."): tensors.pop(name) for name in names}


def _layer_from(
    layer: nn.Module, how: Mapping[str, str], tensors: Mapping[str, Tensor], device: torch.device
) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    if how["stored"] == "nf4":
        return four_bit_from_bytes(layer, tensors, device=device, dtype=getattr(torch, how["compute_dtype"]))
    new = Int8Linear(layer.in_features, layer.out_features, bias="bias" in tensors)
    new.load_state_dict(dict(tensors), assign=True)
    return new.requires_grad_(requires_grad=False).train(layer.training)
