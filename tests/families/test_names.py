"""Original layer names against Diffusers' own checkpoint converters, and real key lists."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
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

from lora_diffusion import Adapter, AdapterMismatchError, LayerAdapter
from lora_diffusion.adapter import flat
from lora_diffusion.families.names import Place, places
from lora_diffusion.families.naming import resolve
from lora_diffusion.families.original import original as renamed

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
LTX = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
LTX |= {"in_channels": 8, "out_channels": 8, "caption_channels": 16}
LTX2 = LTX | {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
LTX2 |= {"audio_in_channels": 8, "audio_out_channels": 8}
MOCHI = {"num_layers": 48, "num_attention_heads": 2, "attention_head_dim": 16, "pooled_projection_dim": 16}
MOCHI |= {"text_embed_dim": 32, "time_embed_dim": 32}  # its converter knows 48 layers alone
COSMOS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "adaln_lora_dim": 8}
COSMOS |= {"text_embed_dim": 32}
KREA2 = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
KREA2 |= {"axes_dims_rope": (4, 6, 6), "intermediate_size": 64, "text_hidden_dim": 32, "text_num_attention_heads": 2}
KREA2 |= {"text_num_key_value_heads": 2, "text_intermediate_size": 48}
SANA = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": 32}
SANA |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "sample_size": 8}
HIDREAM = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
HIDREAM |= {"patch_size": 2, "in_channels": 4, "caption_channels": [32, 32], "text_emb_dim": 32, "llama_layers": [0]}
HUNYUAN_DIT = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
HUNYUAN_DIT |= {"cross_attention_dim_t5": 32, "pooled_projection_dim": 32, "hidden_size": 32, "sample_size": 16}
HUNYUAN_DIT |= {"in_channels": 4, "patch_size": 2}


def convert_hunyuan_dit(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Diffusers' script `convert_hunyuandit_to_diffusers.py`, which is not in its package, does to the layers."""
    found: dict[str, Tensor] = {}
    for key, tensor in checkpoint.items():
        if "Wqkv" in key or "kv_proj" in key:
            parts = ("to_q", "to_k", "to_v") if "Wqkv" in key else ("to_k", "to_v")
            old = "Wqkv" if "Wqkv" in key else "kv_proj"
            found |= {key.replace(old, p): t for p, t in zip(parts, tensor.chunk(len(parts)), strict=True)}
            continue
        if key.startswith("final_layer.adaLN_modulation.1"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for old, new in (
            ("out_proj", "to_out.0"),
            ("attn2.q_proj", "attn2.to_q"),
            ("default_modulation.1", "norm1.linear"),
            ("mlp.fc1", "ff.net.0.proj"),
            ("mlp.fc2", "ff.net.2"),
            ("pooler.", "time_extra_emb.pooler."),
            ("t_embedder.mlp.0", "time_extra_emb.timestep_embedder.linear_1"),
            ("t_embedder.mlp.2", "time_extra_emb.timestep_embedder.linear_2"),
            ("x_embedder", "pos_embed"),
            ("mlp_t5.0", "text_embedder.linear_1"),
            ("mlp_t5.2", "text_embedder.linear_2"),
            ("extra_embedder.0", "time_extra_emb.extra_embedder.linear_1"),
            ("extra_embedder.2", "time_extra_emb.extra_embedder.linear_2"),
            ("final_layer.adaLN_modulation.1", "norm_out.linear"),
            ("final_layer.linear", "proj_out"),
            (".q_norm", ".norm_q"),
            (".k_norm", ".norm_k"),
            (".norm1.weight", ".norm1.norm.weight"),
            (".norm2.", ".norm-third."),
            (".norm3.", ".norm2."),
            (".norm-third.", ".norm3."),
        ):
            key = key.replace(old, new)
        found[key] = tensor
    return found


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
    "framepack": (
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        theirs.convert_hunyuan_video_transformer_to_diffusers,
    ),
    "vace": (
        diffusers.WanVACETransformer3DModel,
        {**WAN, "vace_layers": [0, 1], "vace_in_channels": 4},
        theirs.convert_wan_transformer_to_diffusers,
    ),
    "skyreels": (diffusers.SkyReelsV2Transformer3DModel, WAN, theirs.convert_wan_transformer_to_diffusers),
    "chrono-edit": (diffusers.ChronoEditTransformer3DModel, WAN, theirs.convert_wan_transformer_to_diffusers),
    "ltx": (diffusers.LTXVideoTransformer3DModel, LTX, theirs.convert_ltx_transformer_checkpoint_to_diffusers),
    "ltx2": (diffusers.LTX2VideoTransformer3DModel, LTX2, theirs.convert_ltx2_transformer_to_diffusers),
    "mochi": (diffusers.MochiTransformer3DModel, MOCHI, theirs.convert_mochi_transformer_checkpoint_to_diffusers),
    "cosmos": (
        diffusers.CosmosTransformer3DModel,
        COSMOS,
        theirs.convert_cosmos_transformer_checkpoint_to_diffusers,
    ),
    "krea2": (diffusers.Krea2Transformer2DModel, KREA2, theirs.convert_krea2_transformer_checkpoint_to_diffusers),
    "hunyuan-dit": (diffusers.HunyuanDiT2DModel, HUNYUAN_DIT, convert_hunyuan_dit),
    "sana": (diffusers.SanaTransformer2DModel, SANA, theirs.convert_sana_transformer_to_diffusers),
    "hidream": (diffusers.HiDreamImageTransformer2DModel, HIDREAM, theirs.convert_hidream_transformer_to_diffusers),
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


LTX_SAME = r"(audio_)?(caption_projection.*|proj_out)|transformer_blocks\.\d\..*"
#: layers that are called the same in both, and so need no entry
SAME = {
    "chroma": r"distilled_guidance_layer\.(in|out)_proj",
    "sd3": "context_embedder",
    "lumina2": "x_embedder",
    "z-image": r".*feed_forward\.w\d|(layers|noise_refiner)\.\d\.adaLN_modulation\.0|(t|cap)_embedder\..*",
    "wan": "patch_embedding",
    "skyreels": "patch_embedding",
    "chrono-edit": "patch_embedding",
    "vace": "(vace_)?patch_embedding",
    "framepack": "image_projection.*|clean_x_embedder.*",
    "ltx": f"{LTX_SAME}",
    "ltx2": f"{LTX_SAME}",
    "hidream": ".*",
    "hunyuan-dit": r".*skip_linear|time_extra_emb\.style_embedder",
}
#: other tools' names of layers that the checkpoint calls otherwise, and of parts of its layers
OTHERS = re.compile(r"\.linear1\.qkv|\.attention\.to\.[qkv]|(qkv|linear1)\.[0-3]$")
COMFY_HUNYUAN = re.compile(
    r"(img|txt)_attn\.|(img|txt)_mlp\.\d|_mod\.lin$|modulation\.lin$|self_attn\.|blocks\..*\.mlp\.\d|\.norm\.|(time|guidance)_in\.(in|out)_layer|_embedder\.(in|out)_layer"
)


@pytest.mark.parametrize("family", CASES)
def test_diffusers_converter_puts_every_original_layer_where_we_do(family: str):
    cls, config, convert = CASES[family]
    live = {name: module for name, module in build(cls, **config).named_modules() if hasattr(module, "weight")}
    live = {name: module for name, module in live.items() if module.weight is not None}
    matrices = [name for name, module in live.items() if module.weight.ndim > 1]
    same = re.compile(SAME.get(family, "$"))
    whole = {layer: Place((layer,)) for layer in matrices if same.fullmatch(layer)}
    for name, place in places(cls.__name__, live).items():
        is_others = OTHERS.search(name) or (family in ("hunyuan", "framepack") and COMFY_HUNYUAN.search(name))
        if not is_others:
            whole[name] = place
    stamps = {name: torch.cat(list(stamped(place, live))) for name, place in whole.items()}
    norms = {f"{name}.scale": stamps[name] for name, place in whole.items() if place.layers[0] not in matrices}
    converted = convert(Checkpoint({f"{name}.weight": stamp for name, stamp in stamps.items()} | norms))
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


LIVE_NORMS = ("blocks.1.norm2", "blocks.1.norm3", "blocks.0.norm1.norm")


def norm_change(name: str, value: float) -> dict[str, LayerAdapter]:
    return {name: LayerAdapter("norm", {"w_norm": torch.full((32,), value)})}


@pytest.mark.parametrize("spelled", [str, flat])
def test_hunyuan_dits_second_and_third_norm_are_whose_the_files_other_names_are(spelled: Any):
    model = build(*CASES["hunyuan-dit"][:1], **CASES["hunyuan-dit"][1])
    second, third = (spelled(f"blocks.1.norm{number}") for number in (2, 3))
    norms = norm_change(second, 2.0) | norm_change(third, 3.0)
    original = norms | norm_change(spelled("blocks.0.norm1"), 1.0)
    ours = norms | norm_change(spelled("blocks.0.norm1.norm"), 1.0)
    found = resolve(original, model).origins
    assert found == {
        "blocks.1.norm3": second,
        "blocks.1.norm2": third,
        "blocks.0.norm1.norm": spelled("blocks.0.norm1"),
    }
    assert resolve(ours, model).origins == dict(zip(LIVE_NORMS, ours, strict=True))
    with pytest.raises(
        AdapterMismatchError, match=r"norm2' could be 'blocks\.1\.norm2' .*'blocks\.1\.norm3'.* no other"
    ):
        resolve(norms, model)
    with pytest.raises(AdapterMismatchError, match="both kinds"):
        resolve(original | norm_change(spelled("blocks.0.attn2.norm_q"), 1.0), model)


def test_hunyuan_dits_norms_come_back_from_the_checkpoints_names():
    model = build(*CASES["hunyuan-dit"][:1], **CASES["hunyuan-dit"][1])
    layers = {name: norm_change(name, value)[name] for value, name in enumerate(LIVE_NORMS)}
    adapter = renamed(Adapter("norms", {"transformer": layers}), {"transformer": model})
    assert {name: layer.tensors["w_norm"][0].item() for name, layer in adapter.layers["transformer"].items()} == {
        "blocks.1.norm3": 0.0,
        "blocks.1.norm2": 1.0,
        "blocks.0.norm1": 2.0,
    }
    assert resolve(adapter.layers["transformer"], model).layers == layers
