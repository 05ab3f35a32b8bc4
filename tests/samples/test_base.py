"""The base that ships opens in stock Diffusers, is small, draws, and its card tells its scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

BASE = Path(__file__).parents[2] / "samples" / "base"
pytestmark = pytest.mark.skipif(not (BASE / "unet").is_dir(), reason="samples/base has no weights yet")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt, seed=0):
    random = torch.Generator().manual_seed(seed)
    drawn = pipeline(prompt, num_inference_steps=10, guidance_scale=2.5, generator=random, output_type="np").images[0]
    return drawn.astype(np.float64)


def test_all_parts_are_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.suffix in (".safetensors", ".json")) < 16e6


def test_no_configuration_names_a_folder_of_ours():
    for config in BASE.rglob("*.json"):
        assert "_name_or_path" not in config.read_text("utf-8"), config


def test_loads_in_one_dtype_and_without_a_safety_checker(pipeline):
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert pipeline.safety_checker is None


def test_a_red_apple_is_red_and_a_green_apple_is_green(pipeline):
    for prompt, strong, weak in ("red apple", 0, 1), ("green apple", 1, 0):
        drawn = draw(pipeline, prompt)
        middle = drawn[24:48, 16:48].mean((0, 1))
        assert middle[strong] > middle[weak] + 0.1, (prompt, middle)


def test_backgrounds_are_white(pipeline):
    corners = draw(pipeline, "red apple")[:4, :4]
    assert corners.mean() > 0.97


def test_no_word_is_unknown(pipeline):
    for text in ("kiki woman cook", "Übergrößenträger", "🍎", "日本"):
        ids = pipeline.tokenizer(text).input_ids
        assert pipeline.tokenizer.eos_token_id not in ids[1:-1]


def test_the_card_tells_the_gate():
    scores = json.loads((BASE / "scores.json").read_text("utf-8"))
    card = (BASE / "README.md").read_text("utf-8")
    for condition, holds in scores["gate"].items():
        assert f"**{'yes' if holds else 'no'}**: {condition}" in card
