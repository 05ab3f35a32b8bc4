"""Text encoders under the names of ComfyUI, sd-scripts and OneTrainer: the live pipeline says which one is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lora_diffusion import (
    Adapter,
    AdapterFileError,
    AdapterMismatchError,
    AdapterStack,
    LayerAdapter,
    load_adapter,
    save_adapter,
)
from lora_diffusion.families.original import dotted, named_for
from lora_diffusion.fitting import fit
from tests import tiny
from tests import tiny_families as more
from tests.formats import random_adapters
from tests.formats.test_spellings import KOHYA, opened, respelled
from tests.tiny import WIDTH

LAYER = "layers.1.self_attn.q_proj"


def llama(cls: type) -> nn.Module:
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return cls(LlamaConfig(**shape, vocab_size=50))


def pair(width: int = WIDTH) -> Adapter:
    return Adapter("a", {"text_encoder": {LAYER: random_adapters.low_rank(nn.Linear(width, width), 2, 3.0)}})


ENCODERS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "Qwen-Image in ComfyUI": (
        more.qwen_image,
        "text_encoders.qwen25_7b.transformer.model.layers.1.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
    ),
    "Qwen-Image in sd-scripts": (
        more.qwen_image,
        "lora_te_layers_1_self_attn_q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
    ),
    "Z-Image in ComfyUI": (more.z_image, "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj", LAYER),
    "Lumina 2 in ComfyUI": (more.lumina2, "text_encoders.gemma2_2b.transformer.model.layers.1.self_attn.q_proj", LAYER),
    "FLUX.2 in ComfyUI": (
        more.flux2,
        "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ),
    "FLUX.2 without the level": (more.flux2, "text_encoder.layers.1.self_attn.q_proj", f"model.{LAYER}"),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_a_language_model_is_found_whatever_stands_round_its_layers(case: str, tmp_path: Path):
    build, name, live = ENCODERS[case]
    pipe = build()
    expected = pair()
    adapter = opened(respelled(expected, lambda *_: name, KOHYA), tmp_path)
    found = fit(adapter, {"text_encoder": pipe.text_encoder})
    assert found.layers == {("text_encoder", live): expected.layers["text_encoder"][LAYER]}
    assert not found.unplaced


def test_hidream_and_hunyuan_video_have_llama_and_clip_in_places_of_their_own(tmp_path: Path):
    clip = "text_model.encoder.layers.0.mlp.fc1"
    layers = {"text_encoder": {clip: random_adapters.low_rank(nn.Linear(WIDTH, 2 * WIDTH), 2, 1.0)}}
    layers["text_encoder_4"] = pair().layers["text_encoder"]
    names = {"text_encoder": f"clip_l.transformer.{clip}", "text_encoder_4": f"llama.transformer.model.{LAYER}"}
    adapter = opened(respelled(Adapter("a", layers), lambda c, _: f"text_encoders.{names[c]}", KOHYA), tmp_path)
    hidream: dict[str, nn.Module] = {
        "text_encoder": tiny.clip(),
        "text_encoder_2": tiny.clip(),
        "text_encoder_3": tiny.t5(WIDTH),
    }
    hidream["text_encoder_4"] = llama(LlamaForCausalLM)
    hunyuan = {"text_encoder": llama(LlamaModel), "text_encoder_2": tiny.clip()}
    live = "encoder.layers.0.mlp.fc1"
    assert fit(adapter, hidream).layers.keys() == {("text_encoder", live), ("text_encoder_4", f"model.{LAYER}")}
    assert fit(adapter, hunyuan).layers.keys() == {("text_encoder_2", live), ("text_encoder", LAYER)}
    assert dotted(adapter, hunyuan).layers.keys() == hunyuan.keys()
    assert load_adapter(save_adapter(adapter, tmp_path / "again.safetensors", format="comfy")) == adapter


def test_t5_of_chroma_is_its_only_text_encoder_and_weighs_there(tmp_path: Path):
    pipe = more.chroma()
    expected = random_adapters.over(pipe, "transformer", "text_encoder")
    prefixes = {"transformer": "transformer.", "text_encoder": "text_encoders.t5xxl.transformer."}
    adapter = opened(respelled(expected, lambda c, name: prefixes[c] + name, KOHYA), tmp_path)
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    stack = AdapterStack(pipe)
    stack.add(adapter, {"text_encoder": 0.5, "denoiser": 1.0})
    assert stack.slots["text_encoder"].keys() == expected.layers["text_encoder"].keys()
    assert {slot.weights for slot in stack.slots["text_encoder"].values()} == {(0.5,)}
    stack.clear()
    assert all((before[name] == value).all() for name, value in pipe.text_encoder.state_dict().items())


def test_what_two_text_encoders_could_mean_or_none_has_no_place(tmp_path: Path):
    tensors = respelled(pair(), lambda *_: f"text_encoders.llama.transformer.model.{LAYER}", KOHYA)
    adapter = opened(tensors, tmp_path)
    two = {"text_encoder": llama(LlamaModel), "text_encoder_2": llama(LlamaModel)}
    for models in (two, {"text_encoder": tiny.clip()}):
        found = fit(adapter, models)
        assert not found.layers
        assert set(found.unmatched.values()) == {"the pipeline has no text_encoder_4"}
        with pytest.raises(AdapterMismatchError, match="no text_encoder_4"):
            dotted(adapter, models)


@pytest.mark.parametrize(("spelling", "prefix"), [("comfy", "text_encoders.t5xxl."), ("kohya", "lora_te3_")])
def test_t5_of_flux_is_written_as_the_tools_count_it(spelling: str, prefix: str, tmp_path: Path):
    expected = random_adapters.over(tiny.flux(), "transformer", "text_encoder", "text_encoder_2")
    path = save_adapter(expected, tmp_path / "a.safetensors", format=spelling)
    blocks = [key for key in load_file(path) if "encoder.block." in key or "encoder_block_" in key]
    assert len(blocks) == 3 * len(expected.layers["text_encoder_2"])
    assert all(key.startswith(prefix) for key in blocks)
    assert load_adapter(path) == expected


def first(width: int, name: str) -> dict[str, LayerAdapter]:
    return {name: random_adapters.low_rank(nn.Linear(width, 8), 2, 3.0)}


@pytest.mark.parametrize(("context", "called"), [(768, "clip_l"), (1024, "clip_h"), (2048, "clip_l")])
def test_comfyui_calls_the_text_encoder_of_stable_diffusion_2_by_another_name(
    context: int, called: str, tmp_path: Path
):
    unet = first(context, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    expected = Adapter("a", {"unet": unet, "text_encoder": first(1024, "text_model.encoder.layers.0.mlp.fc1")})
    path = save_adapter(expected, tmp_path / "a.safetensors", format="comfy")
    texts = [key for key in load_file(path) if key.startswith("text_encoders.")]
    start = f"text_encoders.{called}.transformer.text_model.encoder.layers.0.mlp.fc1."
    assert len([key for key in texts if key.startswith(start)]) == len(texts) == 3
    assert load_adapter(path) == expected


@pytest.mark.parametrize(
    ("width", "called"),
    [
        *((1024, "qwen3_06b"), (2304, "gemma2_2b"), (2560, "qwen3_4b"), (3584, "qwen25_7b"), (4096, "qwen3_8b")),
        *((5120, "mistral3_24b"), (WIDTH, "text_encoder")),
    ],
)
@pytest.mark.parametrize("live", ["", "model.", "model.language_model."])
def test_a_language_model_is_written_as_comfyui_and_sd_scripts_call_it(
    width: int, called: str, live: str, tmp_path: Path
):
    module: nn.Module = nn.Linear(width, 8, device="meta")
    for part in reversed(f"{live}{LAYER}".split(".")):
        module = nn.ModuleDict({part: module})
    models = {"text_encoder": module}
    expected = Adapter("a", {"text_encoder": first(width, f"{live}{LAYER}")})
    for spelling, stem in (
        ("comfy", f"text_encoders.{called}.transformer.model.{LAYER}"),
        ("kohya", "lora_te_layers_1_self_attn_q_proj"),
    ):
        named = named_for(expected, spelling, models)
        path = save_adapter(named, tmp_path / f"{spelling}.safetensors", format=spelling)
        assert {key.rpartition(".lora_")[0] for key in load_file(path) if ".lora_" in key} == {stem}
        read = load_adapter(path)
        assert read == named
        assert dotted(read, models) == expected


@pytest.mark.parametrize("build", [more.chroma, more.pixart])
def test_a_t5_that_is_the_only_text_encoder_is_written_as_comfyui_calls_it(build: Callable[[], Any], tmp_path: Path):
    pipe = build()
    expected = random_adapters.over(pipe, "transformer", "text_encoder")
    path = save_adapter(named_for(expected, "comfy", pipe.components), tmp_path / "a.safetensors", format="comfy")
    texts = {key.partition("encoder.block")[0] for key in load_file(path) if key.startswith("text_encoders.")}
    assert texts == {"text_encoders.t5xxl.transformer."}
    models = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    assert dotted(load_adapter(path), models).layers["text_encoder"] == expected.layers["text_encoder"]


def test_hunyuan_image_has_two_text_encoders_of_other_names(tmp_path: Path):
    block = "encoder.block.0.layer.0.SelfAttention.q"
    layers = {"text_encoder": pair().layers["text_encoder"], "text_encoder_2": first(WIDTH, block)}
    layers["text_encoder_2"][block] = random_adapters.low_rank(nn.Linear(WIDTH, WIDTH), 2, 3.0)
    names = {
        "text_encoder": f"qwen25_7b.transformer.model.{LAYER}",
        "text_encoder_2": f"byt5_small.transformer.{block}",
    }
    adapter = opened(respelled(Adapter("a", layers), lambda c, _: f"text_encoders.{names[c]}", KOHYA), tmp_path)
    models = {"text_encoder": llama(LlamaModel), "text_encoder_2": tiny.t5(WIDTH)}
    assert fit(adapter, models).layers.keys() == {("text_encoder", LAYER), ("text_encoder_2", block)}
    path = save_adapter(adapter, tmp_path / "again.safetensors", format="comfy")
    stem = f"text_encoders.{names['text_encoder_2']}."
    assert {key.partition("lora_")[0] for key in load_file(path) if ".encoder." in key and "lora_" in key} == {stem}
    assert load_adapter(path) == adapter


def test_flattened_names_which_comfyui_would_not_find_are_not_written_for_it(tmp_path: Path):
    adapter = opened(respelled(pair(), lambda *_: "lora_unet_blocks_0_attn_k", KOHYA), tmp_path)
    with pytest.raises(AdapterFileError, match="'blocks_0_attn_k' are flattened names; ComfyUI needs dotted"):
        save_adapter(adapter, tmp_path / "comfy.safetensors", format="comfy")
    assert not (tmp_path / "comfy.safetensors").exists()


T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q"
CLIP_LAYER = "text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("width", "beside", "comfy", "kohya"),
    [
        (4096, {}, "t5xxl", "te3"),
        (1472, {}, "byt5_small", "te2"),
        (WIDTH, {CLIP_LAYER: 768}, "t5xxl", "te3"),
        (WIDTH, {LAYER: 3584}, "byt5_small", "te2"),
    ],
)
def test_a_t5_that_is_second_is_flux_or_hunyuan_images_without_a_denoiser_too(
    width: int, beside: dict[str, int], comfy: str, kohya: str, tmp_path: Path
):
    layers = {"text_encoder_2": {T5_LAYER: random_adapters.low_rank(nn.Linear(width, 8), 2, 3.0)}}
    if beside:
        layers["text_encoder"] = {
            name: random_adapters.low_rank(nn.Linear(each, 8), 2, 3.0) for name, each in beside.items()
        }
    for spelling, stem in (
        ("comfy", f"text_encoders.{comfy}.transformer.{T5_LAYER}.alpha"),
        ("kohya", f"lora_{kohya}_{T5_LAYER.replace('.', '_')}.alpha"),
    ):
        path = save_adapter(Adapter("a", layers), tmp_path / f"{spelling}.safetensors", format=spelling)
        assert stem in load_file(path)
        if comfy == "t5xxl" and beside:  # alone, a third text encoder is Stable Diffusion 3's
            assert load_adapter(path) == Adapter("a", layers)


def test_a_t5_of_which_nothing_tells_whose_it_is_is_not_written_for_comfyui(tmp_path: Path):
    alone = Adapter("a", {"text_encoder_2": {T5_LAYER: random_adapters.low_rank(nn.Linear(WIDTH, 8), 2, 3.0)}})
    with pytest.raises(AdapterFileError, match="neither its width nor another component tells"):
        save_adapter(alone, tmp_path / "a.safetensors", format="comfy")
    assert not list(tmp_path.iterdir())
