"""Family, tool and trigger words of real key lists and real metadata; the metadata that we write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_diffusion import Adapter, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.formats.identity import family_of, settings_of, tool_of, trigger_words
from lora_diffusion.formats.provenance import named_layers
from tests import tiny
from tests.formats import random_adapters
from tests.formats.test_real_keys import parsed


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ("sd15_kohya", "Stable Diffusion 1.x"),
        ("sdxl_kohya", "Stable Diffusion XL"),
        ("flux_lora_kohya", "FLUX.1"),
        ("flux_lora_diffusers", "FLUX.1"),
        ("flux_lora_diffusers_base_model", "FLUX.1"),
        ("flux_lora_xlabs", "FLUX.1"),
        ("flux_control_lora", "FLUX.1"),
        ("anima_lora_kohya", "Anima"),
        ("qwen_image_lora_kohya", "Qwen-Image"),
    ],
)
def test_names_and_widths_tell_the_family(keys: str, family: str):
    assert family_of(named_layers(Adapter("x", parsed(keys).layers))).name == family


def test_metadata_tells_the_tool_and_the_words():
    tags = json.dumps({"10_kiki girl": {"kiki": 40, "hat ": 12}, "reg": {"hat": 20}})
    metadata = {"ss_network_module": "networks.lora", "ss_tag_frequency": tags, "ss_seed": "42"}
    assert tool_of(metadata) == "sd-scripts"
    assert trigger_words(metadata) == ["kiki", "hat"]
    assert trigger_words(metadata | {"modelspec.trigger_phrase": "ohwx, cat"}) == ["ohwx", "cat"]
    assert settings_of(metadata)["seed"] == "42"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 10_000])
def test_damaged_metadata_gives_no_words_and_no_error(text: str):
    assert trigger_words({"ss_tag_frequency": text}) == []
    assert settings_of({"lora_diffusion": text}) == {} or text == '{"a": 1}'


def test_what_is_written_says_what_it_holds(tmp_path: Path):
    adapter = random_adapters.over(tiny.flux(), "transformer")
    adapter.metadata = {"ss_network_dim": "77", "ss_seed": "1", "lora_adapter_metadata": "{}"}
    path = save_adapter(adapter, tmp_path / "a.safetensors", format="kohya", metadata={"modelspec.author": "me"})
    said = load_adapter(path).metadata
    assert said["modelspec.architecture"] == "flux-1-dev/lora"
    assert said["lora_diffusion.content_hash"] == adapter.content_hash
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert (said["ss_network_module"], said["ss_base_model_version"]) == ("networks.lora_flux", "flux1")
    assert (said["ss_seed"], said["modelspec.author"]) == ("1", "me")
    assert "lora_adapter_metadata" not in said


def test_one_rank_and_one_alpha_are_said(tmp_path: Path):
    layer = LayerAdapter("lora", {"down": torch.ones(4, 8), "up": torch.ones(8, 4)}, 2.5)
    path = save_adapter(Adapter("x", {"unet": {"mid_block.a": layer}}), tmp_path / "a.safetensors")
    said = load_adapter(path).metadata
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["modelspec.title"]) == ("4", "2.5", "x")


CLIP, T5, QWEN = (
    "text_model.encoder.layers.0.mlp.fc1",
    "encoder.block.0.layer.0.SelfAttention.q",
    "layers.0.mlp.up_proj",
)


@pytest.mark.parametrize(
    ("layers", "family"),
    [
        ([("text_encoder", CLIP, 768)], "Stable Diffusion 1.x"),
        ([("text_encoder", QWEN, 1024)], "unknown"),
        ([("text_encoder", f"model.{QWEN}", 1024)], "unknown"),
        ([("text_encoder_2", CLIP.replace(".", "_"), 1280)], "Stable Diffusion XL"),
        ([("text_encoder", CLIP, 768), ("text_encoder_2", CLIP, 1280)], "Stable Diffusion XL"),
        ([("text_encoder_2", T5, 1472)], "unknown"),
        ([("text_encoder", CLIP, 768), ("text_encoder_2", T5, 4096)], "unknown"),
        ([("text_encoder", CLIP, 768), ("text_encoder_3", T5, 4096)], "unknown"),
        (
            [("text_encoder", CLIP, 768), ("text_encoder_2", CLIP, 1280), ("text_encoder_3", T5, 4096)],
            "Stable Diffusion 3",
        ),
    ],
)
def test_text_encoders_alone_are_of_a_family_where_clip_tells_it(layers: list[tuple[str, str, int]], family: str):
    assert family_of(layers).name == family
