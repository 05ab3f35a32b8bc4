"""A PEFT folder, as `save_pretrained` writes it and `PeftModel.from_pretrained` reads it; one component a folder.

adapter_model.safetensors    base_model.model.<layer>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector
adapter_config.json          rank and alpha of every layer (the tensors have none), and which layers there are

VeRA is in `peft_vera.py`, AdaLoRA, which is only read, in `peft_adalora.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_diffusion.adapter import DENOISERS, Adapter, LayerAdapter
from lora_diffusion.drafts import whole_folder
from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.formats import container
from lora_diffusion.formats.diffusers import check_names, check_pairs, pair_tensors
from lora_diffusion.formats.peft_config import config_of
from lora_diffusion.formats.peft_vera import vera_config, vera_tensors
from lora_diffusion.formats.provenance import hashes, metadata_for

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


def save_peft_folder(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write `adapter` as the PEFT folder `folder`, whole or not at all; returns the folder.

    AdapterFileError for a folder that exists, unless `overwrite` and it holds a PEFT adapter and nothing else; for
    an adapter of several components or of text encoders (PEFT names none), for other methods than lora, dora and
    vera, and for values that are not finite.
    """
    folder = Path(folder)
    adapter.check()
    is_vera = adapter.methods == {"vera"}
    (check_names if is_vera else check_pairs)(adapter, "PEFT")
    if len(adapter.layers) != 1 or not adapter.layers.keys() <= set(DENOISERS):
        raise AdapterFileError(
            f"adapter {adapter.name!r}: a PEFT folder holds one denoiser, it has {some(adapter.layers)}"
        )
    _check_free(folder, overwrite)
    (layers,) = adapter.layers.values()
    said, metadata = vera_config(layers, f"adapter {adapter.name!r}") if is_vera else (_lora_config(layers), {})
    tensors = vera_tensors(layers) if is_vera else _lora_tensors(layers)
    metadata = {"format": "pt", **metadata_for(adapter, metadata), **hashes(tensors)}
    config = json.dumps(said | _config(layers), indent=2, sort_keys=True)
    try:
        with whole_folder(folder) as draft:
            container.write(draft / MODEL, tensors, metadata)
            (draft / CONFIG).write_text(config + "\n", encoding="utf-8")
    except OSError as error:
        raise AdapterFileError(
            f"{folder}: cannot be written ({error.strerror or error}); nothing was changed"
        ) from error
    return folder


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise AdapterFileError(f"{folder} exists already; choose another name or ask to overwrite it")
    others = {path.name for path in folder.iterdir()} - {CONFIG, MODEL} if folder.is_dir() else {folder.name}
    if others:
        raise AdapterFileError(f"{folder} holds more than a PEFT adapter ({some(sorted(others))}); choose another name")


def _lora_tensors(layers: Mapping[str, LayerAdapter]) -> dict[str, Tensor]:
    return {
        key: tensor
        for name, layer in layers.items()
        for key, tensor in pair_tensors(f"base_model.model.{name}", layer).items()
    }


def _lora_config(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    return config_of(layers) | {"peft_type": "LORA", "lora_dropout": 0.0, "use_rslora": False}


def _config(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    names = "|".join(map(re.escape, sorted(layers)))  # PEFT would find plain names at the end of others too
    return {
        "target_modules": f"^(?:{names})$",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
