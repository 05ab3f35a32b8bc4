"""Models without weights: the layers and shapes of a pipeline folder or of a published base, on the meta device.

Enough to give flattened or original names back their dotted ones, in a fraction of a second and no memory.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_diffusion.errors import ConfigError, TargetError, some

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
_SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "sample_size": 128,
    "pos_embed_max_size": 192,
    "out_channels": 16,
}

_Part = tuple[str, str, dict[str, Any]]  # library, class, configuration
_CLIP, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"

#: family, as `formats.identity` names it -> component -> model
PUBLISHED: dict[str, dict[str, _Part]] = {
    "Stable Diffusion 1.x": {
        "unet": ("diffusers", "UNet2DConditionModel", {"cross_attention_dim": 768}),
        "text_encoder": ("transformers", _CLIP, _CLIP_L),
    },
    "Stable Diffusion 2.x": {
        "unet": (
            "diffusers",
            "UNet2DConditionModel",
            {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]},
        ),
        "text_encoder": ("transformers", _CLIP, _CLIP_H),
    },
    "Stable Diffusion XL": {
        "unet": ("diffusers", "UNet2DConditionModel", _SDXL),
        "text_encoder": ("transformers", _CLIP, _CLIP_L),
        "text_encoder_2": ("transformers", _PROJECTED, _CLIP_G),
    },
    "Stable Diffusion 3": {
        "transformer": ("diffusers", "SD3Transformer2DModel", _SD3),
        "text_encoder": ("transformers", _PROJECTED, _CLIP_L),
        "text_encoder_2": ("transformers", _PROJECTED, _CLIP_G),
        "text_encoder_3": ("transformers", "T5EncoderModel", _T5_XXL),
    },
    "FLUX.1": {
        "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
        "text_encoder": ("transformers", _CLIP, _CLIP_L),
        "text_encoder_2": ("transformers", "T5EncoderModel", _T5_XXL),
    },
}


def skeleton(family: str) -> dict[str, nn.Module]:
    """Component -> model of a family's published base. TargetError where the family has none here."""
    if family not in PUBLISHED:
        raise TargetError(f"no model of {family!r} is known by heart; there are {some(PUBLISHED, 9)}; name a base")
    return {name: _build(*part) for name, part in PUBLISHED[family].items()}


def skeleton_of(folder: str | Path) -> dict[str, nn.Module]:
    """Component -> model of a pipeline folder, from its configuration files. ConfigError where they are none."""
    folder = Path(folder)
    index = _json(folder / "model_index.json")
    found: dict[str, nn.Module] = {}
    for name, entry in index.items():
        config = folder / name / "config.json"
        if isinstance(entry, list) and entry[0] in ("diffusers", "transformers") and config.is_file():
            found[name] = _build(entry[0], str(entry[1]), _json(config))
    if not found:
        raise ConfigError(f"{folder}: no model in this pipeline folder has a configuration")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{path} is missing; expected the folder of a Diffusers pipeline") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged JSON ({error})") from None


def _build(library: str, name: str, config: dict[str, Any]) -> nn.Module:
    cls: Any = getattr(import_module(library), name, None)
    if nn.Module not in getattr(cls, "__mro__", ()):
        raise ConfigError(f"{library} has no model class {name[:80]!r}; the base's model_index.json names it")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(settings)
        return cls(cls.config_class(**settings))
