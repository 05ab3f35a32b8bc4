"""The Diffusers/PEFT spelling: `unet.<layer>.lora_A.weight`, alpha in the `lora_adapter_metadata` JSON.

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight              (rank, in[, kh, kw])   = down
    unet.down_blocks.0.attentions.0.proj_in.lora_B.weight              (out, rank[, 1, 1])    = up
    text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight
    metadata: {"unet.r": 16, "unet.lora_alpha": 8, "unet.rank_pattern": {}, "unet.alpha_pattern": {}, …}

Diffusers 0.42 refuses `.alpha` tensors here and obeys the metadata, for every component if for one. CLIP layers
are written with the `text_model.` level that models of transformers < 5 have; Diffusers drops it where the live
model has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.formats import Parsed
from lora_diffusion.formats.assemble import assemble
from lora_diffusion.formats.keys import is_flattened
from lora_diffusion.formats.peft_config import METADATA_KEY, config_of, scales_of, without_magnitudes

_RECOGNISED = re.compile(
    r"^(unet|transformer(_2)?|prior|controlnet|text_encoder(_[234])?)\..+\.(lora_[AB]|lora)\.", re.DOTALL
)
_SUFFIXES = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_CLIP_BODY = ("encoder.layers.", "final_layer_norm", "embeddings.")


class Diffusers:
    """Reads and writes what `pipe.save_lora_weights` writes and `pipe.load_lora_weights` reads."""

    name = "diffusers"
    writes = True

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether any tensor has a component prefix and a PEFT suffix."""
        return any(_RECOGNISED.match(key) for key in keys)

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """The neutral form; alphas from the metadata, or from `.alpha` tensors where a tool has put some."""
        scales = scales_of(metadata)

        def alpha_of(component: str, layer: str, rank: int) -> float | None:
            return scales[component].alpha(layer, rank) if component in scales else None

        doras = [component for component, scale in scales.items() if scale.dora]
        return without_magnitudes(assemble(tensors, alpha_of), doras)

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata. AdapterFileError for other methods than `lora` and `dora`, flattened names, tokens."""
        check_pairs(adapter, "Diffusers")
        tensors: dict[str, Tensor] = {}
        config: dict[str, Any] = {}
        for component, layers in adapter.layers.items():
            is_text = component.startswith("text_encoder")
            for name, layer in layers.items():
                tensors |= pair_tensors(f"{component}.{_with_clip_level(name) if is_text else name}", layer)
            live = {name.removeprefix("text_model.") if is_text else name: layer for name, layer in layers.items()}
            config |= {f"{component}.{key}": value for key, value in config_of(live, is_text).items()}
        return tensors, {**adapter.metadata, "format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}


def _with_clip_level(name: str) -> str:
    return f"text_model.{name}" if name.startswith(_CLIP_BODY) else name


def pair_tensors(path: str, layer: LayerAdapter) -> dict[str, Tensor]:
    """One layer's tensors under PEFT's suffixes."""
    tensors = {f"{path}.{_SUFFIXES[part]}": tensor for part, tensor in layer.tensors.items()}
    magnitude = layer.tensors.get("magnitude")
    if magnitude is not None and layer.tensors["down"].ndim > 2:
        tensors[f"{path}.{_SUFFIXES['magnitude']}"] = magnitude.reshape(1, -1, *(1,) * (layer.tensors["down"].ndim - 2))
    return tensors


def check_pairs(adapter: Adapter, spelling: str) -> None:
    """AdapterFileError for what PEFT's LoRA cannot say: tokens, other methods than lora and dora, flattened names."""
    who = f"adapter {adapter.name!r}"
    check_names(adapter, spelling)
    others = sorted(adapter.methods - {"lora", "dora"})
    if others:
        raise AdapterFileError(f"{who}: the {spelling} spelling cannot say {some(others)}, only lora and dora")
    parts = [f"{n}.{part}" for _, n, layer in adapter for part in layer.tensors if part not in _SUFFIXES]
    if parts:
        raise AdapterFileError(f"{who}: the {spelling} spelling cannot say {some(parts)}")
    by_input = [n for _, n, layer in adapter if layer.method == "dora" and layer.tensors["magnitude"].ndim > 1]
    if by_input:
        raise AdapterFileError(
            f"{who}: {some(by_input)} have a magnitude for each input; {spelling}'s DoRA has none such"
        )
    for component, layers in adapter.layers.items():
        if len({layer.method for layer in layers.values()}) > 1:
            raise AdapterFileError(f"{who}: {spelling} takes DoRA on all layers of {component} or on none")


def check_names(adapter: Adapter, spelling: str) -> None:
    """AdapterFileError for tokens, and for flattened layer names."""
    who = f"adapter {adapter.name!r}"
    if adapter.embeddings:
        raise AdapterFileError(
            f"{who}: the {spelling} spelling has no place for tokens ({some(adapter.embeddings)}); kohya and comfy have"
        )
    flattened = [name for _, name, _ in adapter if is_flattened(name)]
    if flattened:
        raise AdapterFileError(
            f"{who}: {some(flattened)} are flattened names; {spelling} needs dotted ones, which only the model has"
            " (`convert --base` names it)"
        )


DIFFUSERS = Diffusers()
