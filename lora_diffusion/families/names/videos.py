"""The tables of video models, as in `tables`: original names of their layers, by what Diffusers calls them.

ComfyUI renames HunyuanVideo's checkpoint in FLUX's way while it opens it, so adapters have either names.
"""

from __future__ import annotations

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_CONTEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE = "transformer_blocks.{}"
_SINGLE = "single_transformer_blocks.{}"


def _in(block: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{layer}" for layer in layers)


_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
_TXT_IN = "txt_in.individual_token_refiner.blocks.{}"
#: name -> layers, in the way of its authors and in ComfyUI's
HUNYUAN_VIDEO: dict[str, str | tuple[str, ...]] = {
    **{
        f"double_blocks.{{}}.{stream}_attn{dot}{layer}": targets
        for dot in ("_", ".")
        for stream, layer, targets in (
            ("img", "qkv", _in(_DOUBLE, _QKV)),
            ("txt", "qkv", _in(_DOUBLE, _CONTEXT_QKV)),
            ("img", "proj", f"{_DOUBLE}.attn.to_out.0"),
            ("txt", "proj", f"{_DOUBLE}.attn.to_add_out"),
        )
    },
    **{
        f"double_blocks.{{}}.{stream}_attn{name}": f"{_DOUBLE}.attn.norm_{added}{part}"
        for stream, added in (("img", ""), ("txt", "added_"))
        for part, long in (("q", "query"), ("k", "key"))
        for name in (f"_{part}_norm", f".norm.{long}_norm")
    },
    **{
        f"double_blocks.{{}}.{stream}_mlp.{name}": f"{_DOUBLE}.{feed}.{layer}"
        for stream, feed in (("img", "ff"), ("txt", "ff_context"))
        for name, layer in (("fc1", "net.0.proj"), ("fc2", "net.2"), ("0", "net.0.proj"), ("2", "net.2"))
    },
    **{
        f"double_blocks.{{}}.{stream}_mod.{name}": f"{_DOUBLE}.{norm}.linear"
        for stream, norm in (("img", "norm1"), ("txt", "norm1_context"))
        for name in ("linear", "lin")
    },
    "single_blocks.{}.linear1": _in(_SINGLE, (*_QKV, "proj_mlp")),
    "single_blocks.{}.linear2": f"{_SINGLE}.proj_out",
    **{f"single_blocks.{{}}.modulation.{name}": f"{_SINGLE}.norm.linear" for name in ("linear", "lin")},
    **{
        f"single_blocks.{{}}.{name}": f"{_SINGLE}.attn.norm_{part}"
        for part, long in (("q", "query"), ("k", "key"))
        for name in (f"{part}_norm", f"norm.{long}_norm")
    },
    **{f"{_TXT_IN}.self_attn{dot}qkv": _in(_REFINER, _QKV) for dot in ("_", ".")},
    **{f"{_TXT_IN}.self_attn{dot}proj": f"{_REFINER}.attn.to_out.0" for dot in ("_", ".")},
    **{f"{_TXT_IN}.mlp.{name}": f"{_REFINER}.ff.net.0.proj" for name in ("fc1", "0")},
    **{f"{_TXT_IN}.mlp.{name}": f"{_REFINER}.ff.net.2" for name in ("fc2", "2")},
    f"{_TXT_IN}.norm1": f"{_REFINER}.norm1",
    f"{_TXT_IN}.norm2": f"{_REFINER}.norm2",
    f"{_TXT_IN}.adaLN_modulation.1": f"{_REFINER}.norm_out.linear",
    "txt_in.input_embedder": "context_embedder.proj_in",
    **{
        f"{ours}.{name}": f"{theirs}.linear_{number}"
        for ours, theirs, layers in (
            ("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", ("mlp.0", "mlp.2")),
            ("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", ("linear_1", "linear_2")),
            ("time_in", "time_text_embed.timestep_embedder", ("mlp.0", "mlp.2")),
            ("guidance_in", "time_text_embed.guidance_embedder", ("mlp.0", "mlp.2")),
            ("vector_in", "time_text_embed.text_embedder", ()),
        )
        for number, comfy in ((1, "in_layer"), (2, "out_layer"))
        for name in (*layers[number - 1 : number], comfy)
    },
    "img_in.proj": "x_embedder.proj",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_WAN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
WAN = {
    **{
        f"{block}.{{}}.{original}.{part}": f"{block}.{{}}.{attention}.{layer}"
        for block in ("blocks", "vace_blocks")
        for original, attention in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, layer in _WAN_ATTENTION.items()
    },
    **{
        f"{block}.{{}}.{original}": f"{block}.{{}}.{layer}"
        for block in ("blocks", "vace_blocks")
        for original, layer in (("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("norm3", "norm2"))
    },
    "vace_blocks.{}.before_proj": "vace_blocks.{}.proj_in",
    "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}


def _adaln_single(original: str, embed: str) -> dict[str, str]:
    steps = "emb.timestep_embedder.linear_"
    return {
        f"{original}.linear": f"{embed}.linear",
        **{f"{original}.{steps}{number}": f"{embed}.{steps}{number}" for number in (1, 2)},
    }


def _normed(*attentions: str) -> dict[str, str]:
    block = "transformer_blocks.{}"
    return {f"{block}.{a}.{part}_norm": f"{block}.{a}.norm_{part}" for a in attentions for part in "qk"}


LTX = {"patchify_proj": "proj_in", **_adaln_single("adaln_single", "time_embed"), **_normed("attn1", "attn2")}
LTX2 = {
    **LTX,
    "audio_patchify_proj": "audio_proj_in",
    **_adaln_single("audio_adaln_single", "audio_time_embed"),
    **_adaln_single("prompt_adaln_single", "prompt_adaln"),
    **_adaln_single("audio_prompt_adaln_single", "audio_prompt_adaln"),
    **_adaln_single("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    **_adaln_single("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    **_adaln_single("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    **_adaln_single("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    **_normed("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
}
MOCHI = {
    "blocks.{}.mod_x": f"{_DOUBLE}.norm1.linear",
    "blocks.{}.attn.qkv_x": _in(_DOUBLE, ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    "blocks.{}.attn.qkv_y": _in(_DOUBLE, ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")),
    "blocks.{}.attn.proj_x": f"{_DOUBLE}.attn1.to_out.0",
    "blocks.{}.attn.proj_y": f"{_DOUBLE}.attn1.to_add_out",
    "blocks.{}.mlp_x.w1": f"{_DOUBLE}.ff.net.0.proj",
    "blocks.{}.mlp_x.w2": f"{_DOUBLE}.ff.net.2",
    "blocks.{}.mlp_y.w1": f"{_DOUBLE}.ff_context.net.0.proj",
    "blocks.{}.mlp_y.w2": f"{_DOUBLE}.ff_context.net.2",
    **{
        f"blocks.{{}}.attn.{part}_norm_{stream}": f"{_DOUBLE}.attn1.norm_{added}{part}"
        for stream, added in (("x", ""), ("y", "added_"))
        for part in "qk"
    },
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    **{f"t5_y_embedder.{layer}": f"time_embed.pooler.{layer}" for layer in ("to_kv", "to_q", "to_out")},
    "t5_yproj": "time_embed.caption_proj",
    "final_layer.mod": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
#: the last block's modulation of the text has another name, since there is no text behind it
MOCHI_CONTEXT = tuple({"blocks.{}.mod_y": f"{_DOUBLE}.norm1_context.{name}"} for name in ("linear", "linear_1"))
#: Cosmos Predict 2, and Anima, which is one
COSMOS = {
    **{
        f"blocks.{{}}.{original}.{part}": f"{_DOUBLE}.{attention}.{layer}"
        for original, attention in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, layer in {
            **{f"{part}_proj": f"to_{part}" for part in "qkv"},
            **{f"{part}_norm": f"norm_{part}" for part in "qk"},
            "output_proj": "to_out.0",
        }.items()
    },
    **{
        f"blocks.{{}}.adaln_modulation_{part}.{number}": f"{_DOUBLE}.norm{norm}.linear_{number}"
        for norm, part in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
        for number in (1, 2)
    },
    "blocks.{}.mlp.layer1": f"{_DOUBLE}.ff.net.0.proj",
    "blocks.{}.mlp.layer2": f"{_DOUBLE}.ff.net.2",
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
