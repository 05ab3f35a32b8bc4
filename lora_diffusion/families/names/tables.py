"""The tables: original names of the denoisers' layers, by Diffusers model class; those of video models in `videos`.

Collected from the checkpoint converters of Diffusers (diffusers/loaders/single_file_utils.py), against which the
tests hold them. Layers that are called the same in both need no entry.
"""

from __future__ import annotations

from lora_diffusion.families.names import videos

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_CONTEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _in(block: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{{}}.{layer}" for layer in layers)


_DOUBLE = "transformer_blocks"
_SINGLE = "single_transformer_blocks"

#: what FLUX.1, FLUX.2 and Chroma share
_FLUX_ATTENTION = {
    "double_blocks.{}.img_attn.qkv": _in(_DOUBLE, _QKV),
    "double_blocks.{}.txt_attn.qkv": _in(_DOUBLE, _CONTEXT_QKV),
    "double_blocks.{}.img_attn.proj": f"{_DOUBLE}.{{}}.attn.to_out.0",
    "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}.{{}}.attn.to_add_out",
    "double_blocks.{}.img_attn.norm.query_norm": f"{_DOUBLE}.{{}}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": f"{_DOUBLE}.{{}}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": f"{_DOUBLE}.{{}}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": f"{_DOUBLE}.{{}}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": f"{_SINGLE}.{{}}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": f"{_SINGLE}.{{}}.attn.norm_k",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
FLUX = {
    **_FLUX_ATTENTION,
    "double_blocks.{}.img_mlp.0": f"{_DOUBLE}.{{}}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": f"{_DOUBLE}.{{}}.ff.net.2",
    "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}.{{}}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}.{{}}.ff_context.net.2",
    "double_blocks.{}.img_mod.lin": f"{_DOUBLE}.{{}}.norm1.linear",
    "double_blocks.{}.txt_mod.lin": f"{_DOUBLE}.{{}}.norm1_context.linear",
    "single_blocks.{}.linear1": _in(_SINGLE, (*_QKV, "proj_mlp")),
    "single_blocks.{}.linear1.qkv": _in(_SINGLE, _QKV),  # XLabs trains these rows alone
    "single_blocks.{}.linear2": f"{_SINGLE}.{{}}.proj_out",
    "single_blocks.{}.modulation.lin": f"{_SINGLE}.{{}}.norm.linear",
    **{
        f"{ours}.{layer}": f"time_text_embed.{theirs}.linear_{number}"
        for ours, theirs in {
            "time_in": "timestep_embedder",
            "guidance_in": "guidance_embedder",
            "vector_in": "text_embedder",
        }.items()
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    },
    "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",  # Chroma
    "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
}
FLUX2 = {
    **_FLUX_ATTENTION,
    "double_blocks.{}.img_mlp.0": f"{_DOUBLE}.{{}}.ff.linear_in",
    "double_blocks.{}.img_mlp.2": f"{_DOUBLE}.{{}}.ff.linear_out",
    "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}.{{}}.ff_context.linear_in",
    "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}.{{}}.ff_context.linear_out",
    "single_blocks.{}.linear1": f"{_SINGLE}.{{}}.attn.to_qkv_mlp_proj",
    "single_blocks.{}.linear2": f"{_SINGLE}.{{}}.attn.to_out",
    **{f"{name}.lin": f"{name}.linear" for name in ("double_stream_modulation_img", "double_stream_modulation_txt")},
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
}
SD3 = {
    "joint_blocks.{}.x_block.attn.qkv": _in(_DOUBLE, _QKV),
    "joint_blocks.{}.x_block.attn2.qkv": _in(_DOUBLE, ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    "joint_blocks.{}.x_block.attn2.proj": f"{_DOUBLE}.{{}}.attn2.to_out.0",
    "joint_blocks.{}.context_block.attn.qkv": _in(_DOUBLE, _CONTEXT_QKV),
    "joint_blocks.{}.x_block.attn.proj": f"{_DOUBLE}.{{}}.attn.to_out.0",
    "joint_blocks.{}.context_block.attn.proj": f"{_DOUBLE}.{{}}.attn.to_add_out",
    "joint_blocks.{}.x_block.mlp.fc1": f"{_DOUBLE}.{{}}.ff.net.0.proj",
    "joint_blocks.{}.x_block.mlp.fc2": f"{_DOUBLE}.{{}}.ff.net.2",
    "joint_blocks.{}.context_block.mlp.fc1": f"{_DOUBLE}.{{}}.ff_context.net.0.proj",
    "joint_blocks.{}.context_block.mlp.fc2": f"{_DOUBLE}.{{}}.ff_context.net.2",
    "joint_blocks.{}.x_block.adaLN_modulation.1": f"{_DOUBLE}.{{}}.norm1.linear",
    "joint_blocks.{}.context_block.adaLN_modulation.1": f"{_DOUBLE}.{{}}.norm1_context.linear",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def _next_dit(attention: str, rest: dict[str, str]) -> dict[str, str | tuple[str, ...]]:
    """Lumina 2 and Z-Image: the same blocks three times."""
    table: dict[str, str | tuple[str, ...]] = {}
    for block in ("layers", "noise_refiner", "context_refiner"):
        qkv = tuple(f"{block}.{{}}.{attention}.to_{part}" for part in "qkv")
        table[f"{block}.{{}}.attention.qkv"] = qkv
        table |= {f"{block}.{{}}.attention.to.{part}": layer for part, layer in zip("qkv", qkv, strict=True)}
        table[f"{block}.{{}}.attention.out"] = f"{block}.{{}}.{attention}.to_out.0"
        table |= {f"{block}.{{}}.{original}": f"{block}.{{}}.{layer}" for original, layer in rest.items()}
    return table


LUMINA2 = {
    **_next_dit(
        "attn",
        {
            **{f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)},
            "adaLN_modulation.1": "norm1.linear",
        },
    ),
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
Z_IMAGE = {
    **_next_dit("attention", {}),
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
_JOINT = "joint_transformer_blocks"
_FEED = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
AURAFLOW = {
    **{f"double_layers.{{}}.mlpX.{name}": f"{_JOINT}.{{}}.ff.{layer}" for name, layer in _FEED.items()},
    **{f"double_layers.{{}}.mlpC.{name}": f"{_JOINT}.{{}}.ff_context.{layer}" for name, layer in _FEED.items()},
    **{f"single_layers.{{}}.mlp.{name}": f"{_SINGLE}.{{}}.ff.{layer}" for name, layer in _FEED.items()},
    **{f"double_layers.{{}}.attn.w2{part}": f"{_JOINT}.{{}}.attn.to_{part}" for part in "qkv"},
    **{f"double_layers.{{}}.attn.w1{part}": f"{_JOINT}.{{}}.attn.add_{part}_proj" for part in "qkv"},
    **{f"single_layers.{{}}.attn.w1{part}": f"{_SINGLE}.{{}}.attn.to_{part}" for part in "qkv"},
    "double_layers.{}.attn.w2o": f"{_JOINT}.{{}}.attn.to_out.0",
    "double_layers.{}.attn.w1o": f"{_JOINT}.{{}}.attn.to_add_out",
    "single_layers.{}.attn.w1o": f"{_SINGLE}.{{}}.attn.to_out.0",
    "double_layers.{}.modX.1": f"{_JOINT}.{{}}.norm1.linear",
    "double_layers.{}.modC.1": f"{_JOINT}.{{}}.norm1_context.linear",
    "single_layers.{}.modCX.1": f"{_SINGLE}.{{}}.norm1.linear",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    "final_linear": "proj_out",
    "modF.1": "norm_out.linear",
}
SANA = {
    "blocks.{}.attn.qkv": _in(_DOUBLE, ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    "blocks.{}.attn.proj": f"{_DOUBLE}.{{}}.attn1.to_out.0",
    "blocks.{}.cross_attn.q_linear": f"{_DOUBLE}.{{}}.attn2.to_q",
    "blocks.{}.cross_attn.kv_linear": _in(_DOUBLE, ("attn2.to_k", "attn2.to_v")),
    "blocks.{}.cross_attn.proj": f"{_DOUBLE}.{{}}.attn2.to_out.0",
    **{
        f"blocks.{{}}.mlp.{name}_conv.conv": f"{_DOUBLE}.{{}}.ff.conv_{name}" for name in ("inverted", "depth", "point")
    },
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
}
#: its second norm is Diffusers' third, and the reverse: what a file means by them, its other layers say
HUNYUAN_DIT = {
    "blocks.{}.attn1.Wqkv": _in("blocks", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    "blocks.{}.attn1.out_proj": "blocks.{}.attn1.to_out.0",
    "blocks.{}.attn2.q_proj": "blocks.{}.attn2.to_q",
    "blocks.{}.attn2.kv_proj": _in("blocks", ("attn2.to_k", "attn2.to_v")),
    "blocks.{}.attn2.out_proj": "blocks.{}.attn2.to_out.0",
    "blocks.{}.default_modulation.1": "blocks.{}.norm1.linear",
    "blocks.{}.mlp.fc1": "blocks.{}.ff.net.0.proj",
    "blocks.{}.mlp.fc2": "blocks.{}.ff.net.2",
    "blocks.{}.norm1": "blocks.{}.norm1.norm",
    "blocks.{}.norm2": "blocks.{}.norm3",
    "blocks.{}.norm3": "blocks.{}.norm2",
    **{f"blocks.{{}}.attn{n}.{part}_norm": f"blocks.{{}}.attn{n}.norm_{part}" for n in (1, 2) for part in "qk"},
    **{f"pooler.{part}_proj": f"time_extra_emb.pooler.{part}_proj" for part in "kqvc"},
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
    "mlp_t5.0": "text_embedder.linear_1",
    "mlp_t5.2": "text_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_KREA2_BLOCK = {
    **{f"attn.w{part}": f"attn.to_{part}" for part in "qkv"},
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    **{f"attn.qknorm.{part}norm": f"attn.norm_{part}" for part in "qk"},
    **{f"mlp.{part}": f"ff.{part}" for part in ("gate", "up", "down")},
    "prenorm": "norm1",
    "postnorm": "norm2",
}
KREA2 = {
    **{
        f"{original}.{{}}.{layer}": f"{block}.{{}}.{target}"
        for original, block in (
            ("blocks", "transformer_blocks"),
            ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
            ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
        )
        for layer, target in _KREA2_BLOCK.items()
    },
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.0": "txt_in.norm",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.norm": "final_layer.norm",
    "last.linear": "final_layer.linear",
}

#: Stable Cascade as ComfyUI and sd-scripts have it, its fused projections already divided
CASCADE = {
    f"{side}_blocks.{level}.{{}}.attention.attn.{name}": f"{side}_blocks.{level}.{{}}.attention.{layer}"
    for side in ("down", "up")
    for level in range(4)
    for name, layer in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("out_proj", "to_out.0"))
}

TABLES = {
    "FluxTransformer2DModel": (FLUX,),
    "ChromaTransformer2DModel": (FLUX,),
    "Flux2Transformer2DModel": (FLUX2,),
    "SD3Transformer2DModel": (SD3,),
    "SanaTransformer2DModel": (SANA,),
    "HunyuanDiT2DModel": (HUNYUAN_DIT,),
    "Krea2Transformer2DModel": (KREA2,),
    "StableCascadeUNet": (CASCADE,),
    "HunyuanVideoTransformer3DModel": (videos.HUNYUAN_VIDEO,),
    "HunyuanVideoFramepackTransformer3DModel": (videos.HUNYUAN_VIDEO,),
    "Lumina2Transformer2DModel": (LUMINA2,),
    "ZImageTransformer2DModel": (Z_IMAGE,),
    "WanTransformer3DModel": (videos.WAN,),
    "WanVACETransformer3DModel": (videos.WAN,),
    "SkyReelsV2Transformer3DModel": (videos.WAN,),
    "ChronoEditTransformer3DModel": (videos.WAN,),
    "AuraFlowTransformer2DModel": (AURAFLOW,),
    "LTXVideoTransformer3DModel": (videos.LTX,),
    "LTX2VideoTransformer3DModel": (videos.LTX2,),
    "LTX2TextConnectors": ({"aggregate_embed": "text_proj_in"},),
    "MochiTransformer3DModel": (videos.MOCHI, *videos.MOCHI_CONTEXT),
    "CosmosTransformer3DModel": (videos.COSMOS,),
}
