"""The Diffusers/PEFT spelling against Diffusers itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from lora_diffusion import Adapter, AdapterFileError, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.formats.diffusers import DIFFUSERS
from lora_diffusion.formats.peft_config import METADATA_KEY, Scales
from tests import tiny
from tests.formats import random_adapters


def pair(rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.randn(rank, 8),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.randn(8, rank),
    }


@pytest.mark.parametrize(
    ("build", "components"),
    [
        (tiny.sd, ("unet", "text_encoder")),
        (tiny.sdxl, ("unet", "text_encoder", "text_encoder_2")),
        (tiny.flux, ("transformer", "text_encoder")),
        (tiny.sd3, ("transformer", "text_encoder", "text_encoder_2")),
    ],
)
def test_diffusers_gives_every_layer_the_delta_we_wrote(build, components, tmp_path: Path):
    pipe = build()
    adapter = random_adapters.over(pipe, *components)
    for component in components[1:]:  # what Diffusers trains there
        layers = adapter.layers[component]
        adapter.layers[component] = {n: layer for n, layer in layers.items() if "self_attn" in n or "mlp" in n}
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    pipe.load_lora_weights(str(path), adapter_name="a")
    random_adapters.assert_loaded_by_diffusers(pipe, adapter, "a")
    assert load_adapter(path) == adapter


def test_what_diffusers_writes_is_read_with_its_scale(sd: StableDiffusionPipeline, tmp_path: Path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "proj_in"],
        rank_pattern={"mid_block.*to_q": 2},
        alpha_pattern={"proj_in": 12},
    )
    sd.unet.add_adapter(config)
    layers = get_peft_model_state_dict(sd.unet)
    sd.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict())
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    for name, layer in adapter.layers["unet"].items():
        live = sd.unet.get_submodule(name)
        assert layer.alpha / layer.tensors["down"].shape[0] == live.scaling["default"], name
        assert layer.alpha_source == "metadata"
    assert {layer.alpha for _, _, layer in adapter} == {2, 12}


def test_alpha_is_the_rank_where_the_file_says_nothing():
    layer = DIFFUSERS.load(pair(rank=3), {}).layers["unet"]["mid_block.attentions.0.proj_in"]
    assert (layer.alpha, layer.alpha_source) == (3, "assumed")


def test_rslora_is_folded_into_alpha():
    metadata = {METADATA_KEY: json.dumps({"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True})}
    layer = DIFFUSERS.load(pair(rank=4), metadata).layers["unet"]["mid_block.attentions.0.proj_in"]
    assert layer.alpha / 4 == 6 / 4**0.5


def test_an_alpha_tensor_is_obeyed_and_one_that_contradicts_the_metadata_is_reported():
    key = "unet.mid_block.attentions.0.proj_in.alpha"
    tensors = {**pair(), key: torch.tensor(1.5)}
    layer = DIFFUSERS.load(tensors, {}).layers["unet"]["mid_block.attentions.0.proj_in"]
    assert (layer.alpha, layer.alpha_source) == (1.5, "tensor")
    metadata = {METADATA_KEY: json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    assert "1.5" in DIFFUSERS.load(tensors, metadata).unused[key]


def test_half_a_pair_is_reported_with_what_is_missing():
    tensors = pair()
    down = next(iter(tensors))
    assert "needs up" in DIFFUSERS.load({down: tensors[down]}, {}).unused[down]


def test_a_method_the_spelling_cannot_say_is_refused():
    layer = LayerAdapter("loha", {part: torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}, 2.0)
    with pytest.raises(AdapterFileError, match="'loha'"):
        DIFFUSERS.dump(Adapter("x", {"unet": {"conv_in": layer}}))


def test_flattened_names_are_refused():
    layer = LayerAdapter("lora", {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}, 1.0)
    with pytest.raises(AdapterFileError, match="flattened"):
        DIFFUSERS.dump(Adapter("x", {"unet": {"mid_block_attentions_0_proj_in": layer}}))


def test_patterns_match_as_in_peft():
    from peft.utils.other import get_pattern_key

    table = {
        "^a.b": 1.0,
        "a.b": 2.0,
        r"x\.b": 3.0,
        "blocks.1.*": 4.0,
        "b$": 5.0,
        "[cd]": 6.0,
        r"f\.\d": 7.0,
        r"g\.2\-1": 8.0,
        r"^h.\d+": 10.0,
        r"h\.(\d)\.to_(q|k)": 11.0,
    }
    scales = Scales({"r": 1, "lora_alpha": 9.0, "alpha_pattern": table}, "test")
    for name in (
        "a.b",
        "z.a.b",
        "x.b",
        "q.x.b",
        "blocks.1.q",
        "q.blocks.1.q.r",
        "b",
        "zb",
        "d",
        "e.c",
        "f.3",
        "q.f.3",
        "f.d",
        "g.2-1",
        "h.12",
        "z.h.12",
        "z.h.1.to_k",
        "z.hh.1.to_k",
        "none",
    ):
        assert scales.alpha(name, 1) == table.get(get_pattern_key(table.keys(), name), 9.0), name


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|aa)*b", "a" * 500 + "(", "a{1,9999}", ".*.*.*.*.*.*x", "a?" * 90, "(a|a)" * 60]
)
def test_patterns_that_could_run_away_are_refused(key):
    with pytest.raises(AdapterFileError, match="pattern"):
        Scales({"alpha_pattern": {key: 1.0}}, "test")


def test_thousands_of_slow_patterns_are_given_up_in_seconds():
    scales = Scales({"r": 1, "rank_pattern": {f".*a.*a.*{i}": 4 for i in range(3000)}}, "test")
    begun = time.process_time()
    with pytest.raises(AdapterFileError, match="5 s to match"):
        [scales.alpha("a" * 190 + str(layer), 1) for layer in range(1000)]
    assert time.process_time() - begun < 30
    with pytest.raises(AdapterFileError, match="201 characters"):
        scales.alpha("a" * 201, 1)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga"])
def test_pairs_that_go_with_a_base_that_peft_had_changed_are_refused(start: str):
    settings = {"r": 2, "lora_alpha": 2, "init_lora_weights": start}
    with pytest.raises(AdapterFileError, match=f"'{start}'.*path_initial_model_for_weight_conversion"):
        DIFFUSERS.load(pair(), {METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in settings.items()})})


def test_dora_by_the_metadata_without_magnitudes_is_reported():
    said = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True})
    assert "magnitude" in " ".join(DIFFUSERS.load(pair(), {METADATA_KEY: said}).unused.values())


@pytest.mark.parametrize(
    "text",
    [
        '{"unet.r": 1' + "0" * 400 + "}",
        "{",
        "[]",
        '{"unet.r": "8"}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.rank_pattern": 3}',
    ],
)
def test_damaged_metadata_is_an_error(text):
    with pytest.raises(AdapterFileError):
        DIFFUSERS.load(pair(), {METADATA_KEY: text})


def test_sdxl_second_text_encoder_keeps_its_level(sdxl: StableDiffusionXLPipeline):
    tensors, _ = DIFFUSERS.dump(random_adapters.over(sdxl, "text_encoder", "text_encoder_2"))
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in tensors
    assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in tensors
    assert "text_encoder_2.text_projection.lora_A.weight" in tensors
