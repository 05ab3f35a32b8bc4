"""One tensor name of a file -> component, layer and part. The tables every spelling shares.

A name has up to three of the five choices a spelling makes: a prefix (which component), a body with its
separator (which layer; left as it is, for the families to resolve) and a suffix (which tensor of which method):

    lora_te1_ text_model_encoder_layers_0_mlp_fc1 .lora_down.weight     kohya
    unet.     down_blocks.0.attentions.0.proj_in  .lora_A.weight        Diffusers, PEFT
    diffusion_model. double_blocks.0.img_attn.qkv .lokr_w1              ComfyUI
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

#: the denoiser of a file whose prefix does not say whether it is a U-Net or a transformer
DENOISER = "denoiser"

_ENDS = {"weight": "", "bias": "_bias"}  # of a bottleneck adapter's tensors
#: the suffix after the layer's name -> (method, tensor); "*" goes with any method
PARTS: dict[str, tuple[str, str]] = {
    "alpha": ("*", "alpha"),
    "dora_scale": ("*", "dora_scale"),
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
    "scale": ("set", "value"),  # BFL's Control LoRAs carry whole query and key norms
    "reshape_weight": ("set", "shape"),
    "on_input": ("ia3", "on_input"),
    "weight": ("ia3", "weight"),
    "oft_blocks": ("oft", "blocks"),
    **{
        f"oft_blocks.{part}": ("oft", f"blocks.{part}") for part in range(4)
    },  # sd-scripts' parts of FLUX's fused layers
    "oft_diag": ("oft", "diag"),
    "oft_R.weight": ("oft", "R"),
    "oft_R.scaled_oft": ("oft", "scaled"),  # OneTrainer's mark
    "rescale": ("oft", "rescale"),
    "vera_lambda_d": ("vera", "d"),
    "vera_lambda_b": ("vera", "b"),
    "vera_projection": ("vera", "projection"),
    "bm.weight": ("glora", "bm"),
    "q_layer.weight": ("tlora", "down"),
    "lambda_layer": ("tlora", "sigma"),
    "p_layer.weight": ("tlora", "up"),
    "prefix_k": ("prefix", "k"),
    "prefix_v": ("prefix", "v"),
    **{
        f"adapter_{side}.{key}": ("bottleneck", f"{side}{end}") for side in ("down", "up") for key, end in _ENDS.items()
    },
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

#: part of a name -> what a file with such tensors is; known, and not an adapter that this package has
REFUSED: dict[str, str] = {
    "vera_A": "VeRA; its random matrices are made from a seed here, which PEFT's file does not hold",
    "vera_B": "VeRA; its random matrices are made from a seed here, which PEFT's file does not hold",
    "fourierft_": "FourierFT",
    "hra_": "Householder reflection adaptation",
    "boft_": "PEFT's own BOFT",
    "lllite_": "a ControlNet-LLLite",
    "lora_controlnet": "a Control-LoRA, which is a whole ControlNet",
    "ip_adapter": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "_aux.": "a slider tool's own bookkeeping",
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
    "lora_unet_llm_adapter_": "text_conditioner",  # Anima's, a component of its own in Diffusers
    "diffusion_model.llm_adapter.": "text_conditioner",
    "text_embedding_projection.": "connectors",  # LTX-2's
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
    "text_encoders.llama.transformer.": "text_encoder_4",
    "text_encoders.byt5_small.transformer.": "text_encoder_2",  # HunyuanImage's, beside qwen25_7b
}
_PREFIX = re.compile("|".join(re.escape(prefix) for prefix in sorted(PREFIXES, key=len, reverse=True)))
#: ComfyUI's other encoders, called by their model (qwen25_7b, gemma2_2b, umt5xxl …): a pipeline's only one
_ONLY_ENCODER = re.compile(r"text_encoders\.\w+\.transformer\.")
#: older and tool-specific ways to write a name -> the way that the tables know, applied in this order
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # PEFT keeps the adapter's name where it saved the whole state: .lora_A.default.weight
        (r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(?=\.|$)", r".\1"),
        # attention processors of Diffusers <= 0.21, also without `unet.` in front; CLIP in the same files
        (r"\.self_attn\.to_([qkv])_lora\.", r".self_attn.\1_proj.lora."),
        (r"\.self_attn\.to_out_lora\.", ".self_attn.out_proj.lora."),
        (r"\.processor\.(to_[qkv]|add_[qkv]_proj)_lora\.", r".\1.lora."),
        (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
        # XLabs: lora1 is the image's, lora2 the text's; of single blocks' linear1 only q, k and v
        (r"^(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1\.", r"\1.img_attn.\2.lora."),
        (r"^(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2\.", r"\1.txt_attn.\2.lora."),
        (r"^(single_blocks\.\d+)\.processor\.qkv_lora\.", r"\1.linear1.qkv.lora."),
        (r"^(single_blocks\.\d+)\.processor\.proj_lora\.", r"\1.linear2.lora."),
        # scripts that flattened a Diffusers name, suffix and all: lora_unet_unet_…_to_k_lora_down.weight
        (r"_lora[_.](down|up)\.weight$", r".lora_\1.weight"),
    )
)
_OLD = re.compile(r"_lora[._\d]|\.(?:lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)")  # what a rewrite may touch
_NUMBER = re.compile(r"_\d+_")
_TOWER = re.compile(r"(?:model_|language_model_)*layers_\d+_")
#: stands for a token that the file does not name; the file's own name takes its place
UNNAMED = ""
#: what tools call the text encoder of a token's vectors -> component
TOKEN_ENCODERS: dict[str, str] = {
    "emb_params": "text_encoder",
    "string_to_param.*": "text_encoder",
    "clip_l": "text_encoder",
    "text_encoders_0": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_1": "text_encoder_2",
    "t5": "text_encoder_3",
    "t5xxl": "text_encoder_3",
    "llama": "text_encoder_4",
}
_BUNDLED = re.compile(r"bundle_emb\.(?P<token>.+?)\.(?P<encoder>string_to_param\.\*|[a-z0-9_]+)", re.DOTALL)
_TOKEN = re.compile(r"<[^<>]{1,200}>")
_BARE_TEXT_ENCODER = ("text_model.encoder.", "text_model_encoder_")
_UNET_BLOCKS = ("down_blocks_", "up_blocks_", "mid_block_", "input_blocks_", "output_blocks_", "middle_block_")


class Key(NamedTuple):
    """What a tensor's name says: `layer` in the file's own spelling, `method` "*" where the suffix fits several."""

    component: str
    layer: str
    method: str
    part: str


def split(key: str) -> Key | None:
    """Component, layer, method and part of a tensor name; None where no known suffix or no layer is found."""
    if _OLD.search(key):
        for pattern, replacement in _REWRITES:
            key = pattern.sub(replacement, key)
    words = key.split(".")
    for count in range(min(3, len(words) - 1), 0, -1):
        found = PARTS.get(".".join(words[-count:]))
        if found:
            component, layer = _component(".".join(words[:-count]))
            return Key(component, layer, *found) if layer else None
    return None


def token_of(key: str) -> tuple[str, str] | None:
    """The token whose vectors a tensor of that name is, and what it calls the text encoder; None for other tensors."""
    if found := _BUNDLED.fullmatch(key):
        return found["token"], found["encoder"]
    if key.removesuffix("_out") in TOKEN_ENCODERS:
        return UNNAMED, key
    return (key, "emb_params") if is_bracketed(key) else None


def is_bracketed(token: str) -> bool:
    """Whether a token is spelled as Diffusers' files name theirs: `<cat>`."""
    return _TOKEN.fullmatch(token) is not None


def refused(key: str) -> str | None:
    """What a tensor of that name belongs to, where that is known and not an adapter that can be read."""
    return next((kind for sign, kind in REFUSED.items() if sign in key), None)


def denoiser_of(layers: list[str]) -> str:
    """ "unet" or "transformer": what the layer names (dotted or flattened) of a file's denoiser belong to."""
    is_unet = any(layer.replace(".", "_").startswith(_UNET_BLOCKS) for layer in layers)
    return "unet" if is_unet else "transformer"


def is_flattened(layer: str) -> bool:
    """Whether a layer's name is one that sd-scripts flattened, which cannot be undone without the model."""
    return "." not in layer and _NUMBER.search(layer) is not None


def is_flux(layers: list[str]) -> bool:
    """Whether the layer names of a file's denoiser are those of FLUX."""
    blocks = ("double_blocks_", "single_blocks_", "single_transformer_blocks_")
    return any(layer.replace(".", "_").startswith(blocks) for layer in layers)


def is_language_model(layers: Iterable[str]) -> bool:
    """Whether the layer names of a text encoder are a language model's, and not CLIP's or T5's."""
    return any(_TOWER.match(layer.replace(".", "_")) for layer in layers)


def is_t5(layers: Iterable[str]) -> bool:
    """Whether the layer names of a text encoder are T5's."""
    return any(layer.replace(".", "_").startswith("encoder_block_") for layer in layers)


@lru_cache(maxsize=4096)
def _component(path: str) -> tuple[str, str]:
    prefix = _PREFIX.match(path)
    component, layer = (PREFIXES[prefix[0]], path[prefix.end() :]) if prefix else (DENOISER, path)
    if not prefix and (only := _ONLY_ENCODER.match(path)):
        component, layer = "text_encoder", path[only.end() :]
    if component == DENOISER and layer.startswith(_BARE_TEXT_ENCODER):
        component = "text_encoder"
    return component, layer
