"""One tensor name of a file -> component, layer and part. The tables every spelling shares.

A name has up to three of the five choices a spelling makes: a prefix (which component), a body with its
separator (which layer; left as it is, for the families to resolve) and a suffix (which tensor of which method):

    lora_te1_ text_model_encoder_layers_0_mlp_fc1 .lora_down.weight     kohya
    unet.     down_blocks.0.attentions.0.proj_in  .lora_A.weight        Diffusers, PEFT
    diffusion_model. double_blocks.0.img_attn.qkv .lokr_w1              ComfyUI
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: the denoiser of a file whose prefix does not say whether it is a U-Net or a transformer
DENOISER = "denoiser"

#: the suffix after the layer's name -> (method, tensor); "*" goes with any method
PARTS: dict[str, tuple[str, str]] = {
    "alpha": ("*", "alpha"),
    "dora_scale": ("*", "magnitude"),
    "magnitude": ("*", "magnitude"),
    "lora_magnitude_vector": ("*", "magnitude"),
    "lora_magnitude_vector.weight": ("*", "magnitude"),
    "lora_B.bias": ("*", "up_bias"),
    "diff_b": ("*", "diff_b"),
    "lora_mid.weight": ("locon", "mid"),
    "diff": ("full", "diff"),
    "w_norm": ("norm", "w_norm"),
    "b_norm": ("norm", "b_norm"),
    "set_weight": ("set", "value"),
    "reshape_weight": ("set", "shape"),
    "on_input": ("ia3", "on_input"),
    "weight": ("ia3", "weight"),
    "oft_blocks": ("oft", "blocks"),
    "oft_diag": ("oft", "diag"),
    "oft_R.weight": ("oft", "R"),
    "rescale": ("oft", "rescale"),
    "bm.weight": ("glora", "bm"),
    **{
        f"{pair}{weight}": ("lora", tensor)
        for tensor, pairs in {
            "down": ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down"),
            "up": ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up"),
        }.items()
        for pair in pairs
        for weight in ("", ".weight")
    },
    **{f"hada_{part}": ("loha", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": ("lokr", part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"{part}.weight": ("glora", part) for part in ("a1", "a2", "b1", "b2")},
}

#: what stands before the layer's name -> component; longest first where one begins with another
PREFIXES: dict[str, str] = {
    "lora_unet_unet_": "unet",
    "lora_unet__": DENOISER,
    "lora_unet_": DENOISER,
    "oft_unet_": DENOISER,
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te4_": "text_encoder_4",
    "lora_te_": "text_encoder",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "text_encoder",
    "lycoris_": DENOISER,
    "base_model.model.": DENOISER,
    "unet.base_model.model.": "unet",
    "model.diffusion_model.": DENOISER,
    "diffusion_model.": DENOISER,
    "unet.": "unet",
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
    "prior.": "prior",
    "controlnet.": "controlnet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder_4.": "text_encoder_4",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
_PREFIXES = sorted(PREFIXES, key=len, reverse=True)
_NAMED_ADAPTER = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(?=\.|$)")
_BARE_TEXT_ENCODER = ("text_model.encoder.", "te_text_model_")
_UNET_BLOCKS = ("down_blocks_", "up_blocks_", "mid_block_", "input_blocks_", "output_blocks_", "middle_block_")


class Key(NamedTuple):
    """What a tensor's name says: `layer` in the file's own spelling, `method` "*" where the suffix fits several."""

    component: str
    layer: str
    method: str
    part: str


def split(key: str) -> Key | None:
    """Component, layer, method and part of a tensor name; None where no known suffix or no layer is found."""
    words = _NAMED_ADAPTER.sub(r".\1", key).split(".")
    for count in (3, 2, 1):
        found = PARTS.get(".".join(words[-count:]))
        if found and len(words) > count:
            component, layer = _component(".".join(words[:-count]))
            return Key(component, layer, *found) if layer else None
    return None


def denoiser_of(layers: list[str]) -> str:
    """ "unet" or "transformer": what the layer names (dotted or flattened) of a file's denoiser belong to."""
    is_unet = any(layer.replace(".", "_").startswith(_UNET_BLOCKS) for layer in layers)
    return "unet" if is_unet else "transformer"


def _component(path: str) -> tuple[str, str]:
    for prefix in _PREFIXES:
        if path.startswith(prefix):
            return PREFIXES[prefix], path.removeprefix(prefix)
    return ("text_encoder" if path.startswith(_BARE_TEXT_ENCODER) else DENOISER), path
