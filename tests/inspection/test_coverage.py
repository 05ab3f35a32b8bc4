"""The coverage report and the strength of an adapter, against dense deltas and a live pipeline."""

from __future__ import annotations

import json

import pytest
import torch

from lora_diffusion import Adapter, LayerAdapter
from lora_diffusion.inspection.blocks import block_of, in_order
from lora_diffusion.inspection.coverage import cover
from lora_diffusion.inspection.spectra import effective_rank, singular_values, spectra
from tests import tiny
from tests.formats import random_adapters


def test_an_adapter_that_fits_is_complete_and_every_layer_is_counted():
    pipe = tiny.sd()
    adapter = random_adapters.over(pipe, "unet", "text_encoder")
    report = cover(adapter, pipe)
    assert report.complete
    assert report.placed == len(adapter) == sum(row.layers for row in report.rows)
    assert sum(row.parameters for row in report.rows) == report.parameters == adapter.parameters
    assert "everything is used" in str(report)


def test_what_finds_no_place_is_named_with_the_reason():
    pipe = tiny.sd()
    adapter = random_adapters.over(pipe, "unet")
    pair = {"down": torch.ones(1, 3), "up": torch.ones(3, 1)}
    adapter.layers["unet"] |= {
        "nowhere.at.all": LayerAdapter("lora", pair, 1.0),
        "conv_in": LayerAdapter("lora", pair, 1.0),
        "conv_out": LayerAdapter("no-such-method", pair, 1.0),
    }
    adapter.layers["transformer"] = {"x": LayerAdapter("lora", pair, 1.0)}
    adapter.unused = {"../../x": "no adapter tensor is spelled like that"}
    report = cover(adapter, pipe)
    assert not report.complete
    assert report.unplaced.keys() == {"unet.nowhere.at.all", "unet.conv_in", "unet.conv_out", "transformer.x"}
    assert "no layer" in report.unplaced["unet.nowhere.at.all"]
    assert "expected" in report.unplaced["unet.conv_in"]
    assert "../../x" in str(report)


def test_the_json_says_what_the_table_says():
    adapter = random_adapters.over(tiny.flux(), "transformer")
    report = cover(adapter)
    said = json.loads(report.to_json())
    assert (said["family"], said["layers"], said["complete"], said["placed"]) == ("FLUX.1", len(adapter), True, None)
    assert said["content_hash"] == adapter.content_hash


def test_strength_is_that_of_the_dense_delta():
    adapter = random_adapters.over(tiny.sd(), "unet")
    for _, _, layer in adapter:
        dense = torch.linalg.svdvals(random_adapters.delta(layer)).float()
        ours = singular_values(layer)
        torch.testing.assert_close(ours, dense[: len(ours)], rtol=1e-4, atol=1e-4)
    total = sum(random_adapters.delta(layer).square().sum().item() for *_, layer in adapter)
    assert sum(row.norm**2 for row in spectra(adapter)) == pytest.approx(total, rel=1e-4)


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0


def test_other_methods_have_no_cheap_spectrum():
    layer = LayerAdapter("full", {"diff": torch.ones(3, 3)})
    assert singular_values(layer) is None
    assert spectra(Adapter("x", {"unet": {"conv_in": layer}})) == []


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1"),
        ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "down_blocks.1"),
        ("mid_block_attentions_0_proj_in", "mid_block"),
        ("input_blocks_4_1_proj_in", "input_blocks.4"),
        ("double_blocks.12.img_attn.qkv", "double_blocks.12"),
        ("single_transformer_blocks.3.proj_out", "single_transformer_blocks.3"),
        ("text_model_encoder_layers_10_mlp_fc1", "encoder_layers.10"),
        ("#7", "numbered"),
        ("conv_in", "other"),
    ],
)
def test_layers_belong_to_a_block_in_any_spelling(name: str, block: str):
    assert block_of(name) == block


def test_block_ten_comes_after_block_nine():
    assert sorted(["b.10", "b.9", "mid_block"], key=in_order) == ["b.9", "b.10", "mid_block"]
