"""Original layer names against Diffusers' own checkpoint converters, and real key lists."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor, nn

from lora_diffusion.families.names import Place, places

DATA = Path(__file__).parents[1] / "data"


def build(cls: type, **config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(**config)


WIDE = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 24}
FLUX = {**WIDE, "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True, "in_channels": 16}
SD3 = {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
SD3 |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "dual_attention_layers": (0,)}
LUMINA = {"num_layers": 2, "num_refiner_layers": 1, "hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8}
Z_IMAGE = {"n_layers": 2, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
WAN = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32}
WAN |= {"image_dim": 32, "added_kv_proj_dim": 32, "freq_dim": 32}
HUNYUAN = {**WIDE, "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 32}
AURA = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
AURA |= {"joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 16}
FLUX2 = {**WIDE, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32, "in_channels": 16}
FLUX2 |= {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32}

CASES = {
    "flux": (FluxTransformer2DModel, FLUX, theirs.convert_flux_transformer_checkpoint_to_diffusers),
    "chroma": (
        ChromaTransformer2DModel,
        {**WIDE, "joint_attention_dim": 32, "in_channels": 16},
        theirs.convert_chroma_transformer_checkpoint_to_diffusers,
    ),
    "flux2": (Flux2Transformer2DModel, FLUX2, theirs.convert_flux2_transformer_checkpoint_to_diffusers),
    "sd3": (SD3Transformer2DModel, SD3, theirs.convert_sd3_transformer_checkpoint_to_diffusers),
    "lumina2": (Lumina2Transformer2DModel, LUMINA, theirs.convert_lumina2_to_diffusers),
    "z-image": (ZImageTransformer2DModel, Z_IMAGE, theirs.convert_z_image_transformer_checkpoint_to_diffusers),
    "wan": (WanTransformer3DModel, WAN, theirs.convert_wan_transformer_to_diffusers),
    "hunyuan": (HunyuanVideoTransformer3DModel, HUNYUAN, theirs.convert_hunyuan_video_transformer_to_diffusers),
    "auraflow": (AuraFlowTransformer2DModel, AURA, theirs.convert_auraflow_transformer_checkpoint_to_diffusers),
}


class Checkpoint(dict):
    """A checkpoint that also has every bias and norm that a converter asks for."""

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            return super().pop(key)
        return default[0] if default else torch.zeros(self.rows(key))

    @staticmethod
    def rows(key: str) -> int:
        return 3 * 3072 + 4 * 3072 if "linear1" in key else 12


def stamped(place: Place, live: dict[str, nn.Module]) -> Iterator[Tensor]:
    """One column per layer that says which live row it is: the layer's number and the row's."""
    for name in place.layers:
        rows = live[name].weight.shape[0]
        number = torch.full((rows,), float(list(live).index(name)))
        stamp = torch.stack([number, torch.arange(rows).float()], 1)
        yield stamp.roll(rows // 2, 0) if place.swapped else stamp


#: layers that are called the same in both, and so need no entry
SAME = {
    "chroma": r"distilled_guidance_layer\.(in|out)_proj",
    "sd3": "context_embedder",
    "lumina2": "x_embedder",
    "z-image": r".*feed_forward\.w\d|(layers|noise_refiner)\.\d\.adaLN_modulation\.0|(t|cap)_embedder\..*",
    "wan": "patch_embedding",
}
#: other tools' names of layers that the checkpoint calls otherwise, and of parts of its layers
OTHERS = re.compile(r"\.linear1\.qkv|\.attention\.to\.[qkv]|(qkv|linear1)\.[0-3]$")
COMFY_HUNYUAN = re.compile(
    r"(img|txt)_attn\.|(img|txt)_mlp\.\d|_mod\.lin$|modulation\.lin$|self_attn\.|blocks\..*\.mlp\.\d"
)


@pytest.mark.parametrize("family", CASES)
def test_diffusers_converter_puts_every_original_layer_where_we_do(family: str):
    cls, config, convert = CASES[family]
    live = {name: module for name, module in build(cls, **config).named_modules() if hasattr(module, "weight")}
    matrices = [name for name, module in live.items() if module.weight is not None and module.weight.ndim > 1]
    same = re.compile(SAME.get(family, "$"))
    whole = {layer: Place((layer,)) for layer in matrices if same.fullmatch(layer)}
    for name, place in places(cls.__name__, live).items():
        is_others = OTHERS.search(name) or (family == "hunyuan" and COMFY_HUNYUAN.search(name))
        if not is_others and place.layers[0] in matrices:
            whole[name] = place
    checkpoint = Checkpoint({f"{name}.weight": torch.cat(list(stamped(place, live))) for name, place in whole.items()})
    converted = convert(checkpoint)
    for name, place in whole.items():
        for layer in place.layers:
            assert torch.equal(converted[f"{layer}.weight"], next(stamped(Place((layer,)), live))), (name, layer)
    assert {layer for place in whole.values() for layer in place.layers} >= set(matrices)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_ldm_names_are_those_of_the_published_maps(family: str):
    published = json.loads(gzip.decompress((DATA / "ldm_names.json.gz").read_bytes()))[family]
    assert {
        name: place.layers[0] for name, place in places("UNet2DConditionModel", published.values()).items()
    } == published


def test_unknown_classes_have_no_original_names():
    assert places("SomeNewTransformer2DModel", ["a.b"]) == {}
