"""Which text encoder of a pipeline is which in files that number or name them: T5 is the third in sd-scripts' of FLUX.

FLUX has CLIP-L and T5-XXL, HunyuanImage Qwen2.5-VL and ByT5-small: a T5 that is the second of a pipeline is told by the
denoiser or encoder beside it, or by its width.
"""

from __future__ import annotations

from lora_diffusion.adapter import Adapter
from lora_diffusion.formats.keys import is_flux, is_language_model, is_t5
from lora_diffusion.formats.provenance import named_layers

BYT5 = "byt5_small"
_T5_WIDTHS = {4096: "t5xxl", 1472: BYT5}


def numbered_as(component: str, adapter: Adapter) -> str:
    """The component that it is called in files: FLUX's T5, its second text encoder, is the third there."""
    return "text_encoder_3" if component == "text_encoder_2" and second_t5(adapter) == "t5xxl" else component


def second_t5(adapter: Adapter) -> str:
    """What ComfyUI calls the T5 that is a pipeline's second text encoder: "t5xxl", "byt5_small".

    "" where that is none, "unknown" where nothing in the adapter tells which.
    """
    layers = adapter.layers
    if "text_encoder_3" in layers or not is_t5(layers.get("text_encoder_2", ())):
        return ""
    if "transformer" in layers:
        return "t5xxl" if is_flux(list(layers["transformer"])) else BYT5
    if "text_encoder" in layers:
        return BYT5 if is_language_model(layers["text_encoder"]) else "t5xxl"
    widths = {width for component, _, width in named_layers(adapter) if component == "text_encoder_2"}
    return next((_T5_WIDTHS[width] for width in sorted(widths & _T5_WIDTHS.keys())), "unknown")
