"""What a file is by its names, shapes and metadata: model family, and the tool that wrote it.

Widths decide before names, and names before what the metadata claims: real files call FLUX "sd_1.5".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

#: component, layer name as the file has it, width of the layer's input (0 where the method does not show it)
Named = tuple[str, str, int]


@dataclass(frozen=True)
class Family:
    """A model family: `name` for people, `architecture` for `modelspec.architecture`, `why` we think so."""

    name: str
    architecture: str = ""
    why: str = ""


UNKNOWN = Family("unknown")

#: as sd-scripts calls them; not of Stable Diffusion 2, which has one for each prediction type
_ARCHITECTURES = {
    "Stable Diffusion 1.x": "stable-diffusion-v1",
    "Stable Diffusion XL": "stable-diffusion-xl-v1-base",
    "Stable Diffusion 3": "stable-diffusion-3-medium",
    "FLUX.1": "flux-1-dev",
    "FLUX.2": "flux-2-dev",
    "HunyuanVideo": "hunyuan-video",
    "Qwen-Image": "qwen-image",
    "Wan": "wan2.1",
    "Lumina 2": "lumina-2",
    "Z-Image": "z-image",
}
_CONTEXT = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "Stable Diffusion XL refiner",
    2048: "Stable Diffusion XL",
}
_TEXT = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}

#: layers (flattened) of language models and T5
_NO_CLIP = re.compile(r"(model_|language_model_)*layers_\d+_|encoder_block_")

#: names (flattened) that only one family has -> its name; tried in this order
_NAMES: tuple[tuple[str, str], ...] = (
    (r"(img|txt)_attn_qkv$.*", "FLUX.1"),
    (r"joint_blocks_\d+_", "Stable Diffusion 3"),
    (r"single_transformer_blocks_\d+_attn_to_qkv_mlp_proj|double_stream_modulation", "FLUX.2"),
    (r"single_transformer_blocks_\d+_|single_blocks_\d+_|double_blocks_\d+_", "FLUX.1"),
    (r"blocks_\d+_(attn_(qkv|proj)_[xy]|mlp_[xy]_w\d|mod_[xy])$", "Mochi"),
    (r"blocks_\d+_attn_w[qkvo]$|txtfusion_|text_fusion_", "Krea 2"),
    (r"(double|single)_stream_blocks_\d+_", "HiDream"),
    (r"patchify_proj|av_ca_|av_cross_attn_", "LTX"),
    (r"(double|single)_layers_\d+_|joint_transformer_blocks_", "AuraFlow"),
    (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)", "Qwen-Image"),
    (r"blocks_\d+_(self|cross)_attn_[qkvo]$|condition_embedder_", "Wan"),
    (r"blocks_\d+_(self|cross)_attn_\w+_proj|llm_adapter", "Anima"),
    (r"transformer_blocks_\d+_(norm1_context|ff_context|attn_add_)", "Stable Diffusion 3"),
    (r"(layers|noise_refiner)_\d+_(attention|attn|feed_forward)", "Lumina 2 or Z-Image"),
)

#: block and kind of an attention's projection in Diffusers' names (flattened) of transformers
_ATTENTION = re.compile(r"transformer_blocks_(\d+)_(attn[12]?)_(?:to_[qkv]|add_[qkv]_proj|to_out_0|to_add_out)$")


def family_of(layers: Iterable[Named]) -> Family:
    """The model family that these layers belong to; `UNKNOWN` where nothing tells."""
    flat = [(component, name.replace(".", "_"), width) for component, name, width in layers]
    components = {component for component, *_ in flat}
    if "unet" in components:
        return _unet([layer for layer in flat if layer[0] == "unet"], components)
    if "transformer" in components:
        return _transformer([(name, width) for component, name, width in flat if component == "transformer"])
    return _texts(flat, components)


def _texts(layers: list[Named], components: set[str]) -> Family:
    """Text encoders alone: CLIP tells, whatever else may stand beside language models and T5."""
    others = {component for component, name, _ in layers if _NO_CLIP.match(name)}
    if "text_encoder_2" in components - others:
        third = "text_encoder_3" in components
        return _family("Stable Diffusion 3" if third else "Stable Diffusion XL", "of the number of its text encoders")
    if components != {"text_encoder"} or others:
        return UNKNOWN
    widths = {width for *_, width in layers}
    return next((_family(_TEXT[w], f"its text encoder is {w} wide") for w in sorted(widths & _TEXT.keys())), UNKNOWN)


def family_of_tokens(widths: Iterable[Mapping[str, int]]) -> Family:
    """The family whose text encoders are as wide as learned tokens: component -> width, for each token."""
    for width in widths:
        if width.get("text_encoder") == 768 and width.get("text_encoder_2") == 1280:
            return _family("Stable Diffusion XL", "its tokens are 768 and 1,280 wide")
        alone = width.get("text_encoder", 0) if len(width) == 1 else 0
        if alone in _TEXT:
            return _family(_TEXT[alone], f"its tokens are {alone:,} wide")
    return UNKNOWN


def _family(name: str, why: str) -> Family:
    return Family(name, _ARCHITECTURES.get(name, ""), why)


def _unet(layers: list[Named], components: set[str]) -> Family:
    contexts = {width for _, name, width in layers if re.search(r"attn2_to_[kv]$", name)} & _CONTEXT.keys()
    if len(contexts) == 1:
        width = contexts.pop()
        return _family(_CONTEXT[width], f"its cross-attention reads {width} features")
    if "text_encoder_2" in components or any(re.search(r"transformer_blocks_[1-9]_", name) for _, name, _ in layers):
        return _family("Stable Diffusion XL", "of its depth and text encoders")
    if any(name.startswith("#") for _, name, _ in layers):
        return _family("Stable Diffusion 1.x", "layers are numbered, as cloneofsimo/lora did then")
    return Family("Stable Diffusion 1.x or 2.x", why="it is a U-Net without cross-attention in the file")


def _transformer(layers: list[tuple[str, int]]) -> Family:
    names = [name for name, _ in layers]
    widths = {width for _, width in layers}
    name = next((family for pattern, family in _NAMES if any(re.search(pattern, name) for name in names)), None)
    if name in (None, "Stable Diffusion 3") and (found := _attention_alike(layers)):
        return found
    if name is None:
        return UNKNOWN
    if name == "FLUX.1":
        found = _flux_like(names, widths)
        entrance = max((width for name, width in layers if name in ("img_in", "x_embedder")), default=0)
        wide = f"{found.why}; it reads {entrance} channels and not 64: a Control LoRA, for FluxControlPipeline"
        return Family(found.name, found.architecture, wide) if found.name == "FLUX.1" and entrance == 128 else found
    if name == "Lumina 2 or Z-Image":
        name = "Z-Image" if 3840 in widths else "Lumina 2" if 2304 in widths else name
    return _family(name, "its layers are named like that")


def _attention_alike(layers: list[tuple[str, int]]) -> Family | None:
    """The family of attention that Diffusers calls alike in several, by its width and number; None leaves it to names.

    Stable Diffusion 3 is 1,536 or 2,432 wide; Qwen-Image is as wide as FLUX.1 and HunyuanVideo, with three times their
    blocks. LTX has self- and cross-attention 2,048 or 4,096 wide; CogView of that width has the first alone.
    """
    found = [(match, width) for name, width in layers if (match := _ATTENTION.match(name)) and width >= 1024]
    widths, kinds = {width for _, width in found}, {match[2] for match, _ in found}
    if not found or widths & {1536, 2432}:
        return None
    why = f"its attention is {max(widths):,} wide"
    if {"attn1", "attn2"} <= kinds:
        return _family("LTX", why) if widths <= {2048, 4096} else None
    if kinds != {"attn"}:
        return None
    if widths == {3072} and max(int(match[1]) for match, _ in found) >= 20:
        return _family("Qwen-Image", f"{why}, in more than 20 blocks")
    return _family("FLUX.2", why) if widths == {6144} else UNKNOWN


def _flux_like(names: list[str], widths: set[int]) -> Family:
    """HunyuanVideo has FLUX's names and widths, and another number of blocks; FLUX.2 is wider."""
    numbers = [int(found[1]) for name in names if (found := re.match(r"(?:double|transformer)_blocks_(\d+)_", name))]
    if (
        any(re.search(r"(img|txt)_mlp_fc\d|individual_token_refiner", name) for name in names)
        or max(numbers, default=0) == 19
    ):
        return _family("HunyuanVideo", "its double blocks are named or numbered like that")
    if 6144 in widths and 3072 not in widths:
        return _family("FLUX.2", "its layers are 6,144 wide")
    return _family("FLUX.1", "its blocks are named like that")


_TOOLS: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("lora_diffusion", bool, "lora_diffusion"),
    ("ss_network_module", lambda module: module.startswith("lycoris"), "LyCORIS in sd-scripts"),
    ("ss_network_module", lambda module: "wan" in module or "hunyuan" in module or "qwen" in module, "musubi-tuner"),
    ("ss_network_module", bool, "sd-scripts"),
    ("software", lambda text: "ai-toolkit" in text, "ai-toolkit"),
    ("ot_branch", bool, "OneTrainer"),
    ("ot_config", bool, "OneTrainer"),
    ("lora_adapter_metadata", bool, "Diffusers"),
)


#: keys that only the tool that trained writes
_TRAINERS = {
    "ss_session_id",
    "ss_sd_scripts_commit_hash",
    "ss_training_started_at",
    "software",
    "ot_branch",
    "ot_config",
}


def tool_of(metadata: Mapping[str, str], spelling: str = "") -> str:
    """The tool that wrote the file, as far as metadata and spelling say."""
    origin = next((tool for key, test, tool in _TOOLS if key in metadata and test(metadata[key])), None)
    if "lora_diffusion.version" in metadata:  # says nothing of who trained it; the network's keys are written anew
        foreign = _TRAINERS & metadata.keys()
        return f"{origin}, then lora_diffusion" if foreign and origin else "lora_diffusion"
    if origin:
        return origin
    fixed = {"cloneofsimo": "cloneofsimo/lora", "xlabs": "XLabs", "peft": "PEFT", "lycoris": "LyCORIS"}
    return fixed.get(spelling, "unknown")


def trigger_words(metadata: Mapping[str, str], limit: int = 8) -> list[str]:
    """Words that call the adapter up: what the file declares, else the commonest tags it was trained on."""
    said = metadata.get("modelspec.trigger_phrase", "")
    if said:
        return [word.strip() for word in said.split(",") if word.strip()][:limit]
    counts: dict[str, int] = {}
    try:
        table: Any = json.loads(metadata.get("ss_tag_frequency", "{}"))
        for tags in table.values():
            for tag, count in cast("dict[str, int]", tags).items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return sorted(counts, key=lambda tag: -counts[tag])[:limit]


#: training settings worth showing, by the key under which sd-scripts keeps them
SETTINGS = {
    "ss_sd_model_name": "base model",
    "ss_base_model_version": "base, as the tool calls it",
    "ss_network_module": "network",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate of the denoiser",
    "ss_text_encoder_lr": "learning rate of the text encoder",
    "ss_optimizer": "optimiser",
    "ss_lr_scheduler": "schedule",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps at most",
    "ss_num_train_images": "pictures",
    "ss_num_epochs": "epochs",
    "ss_resolution": "resolution",
    "ss_seed": "seed",
}


def settings_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Training settings found in the metadata, each at most 200 characters."""
    found = {label: metadata[key][:200] for key, label in SETTINGS.items() if metadata.get(key)}
    try:
        ours: Any = json.loads(metadata.get("lora_diffusion", "{}"))
        found |= {key.replace("_", " "): str(value)[:200] for key, value in ours.items() if not isinstance(value, dict)}
    except (ValueError, AttributeError, RecursionError):
        pass  # shown by others as it is; nothing depends on it
    return found
