"""The coverage report and the strength of an adapter, against dense deltas and a live pipeline."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from lora_diffusion import Adapter, LayerAdapter
from lora_diffusion.inspection.blocks import block_of, in_order
from lora_diffusion.inspection.coverage import CoverageReport, cover
from lora_diffusion.inspection.spectra import all_values, effective_rank, singular_values, spectra
from lora_diffusion.methods import METHODS, new_method
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


WITHOUT_BASE = ("lora", "biased", "locon", "loha", "lokr", "full")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("switch", [None, "tucker", "both"])
def test_strength_of_other_methods_is_that_of_their_dense_delta(method: str, kind: str, switch: str | None):
    layer = nn.Linear(24, 40) if kind == "linear" else nn.Conv2d(12, 20, 3)
    known = {field.name for field in fields(METHODS[method])}
    if not METHODS[method].supports(layer) or (switch and switch not in known):
        pytest.skip("it has no such layer")
    adapter = new_method(method, rank=3, alpha=2.0, **({switch: True} if switch else {})).fresh(layer)
    for tensor in adapter.tensors.values():
        if tensor.is_floating_point():
            tensor.normal_()
    values = singular_values(adapter)
    if method not in WITHOUT_BASE:
        assert values is None
        assert spectra(Adapter("x", {"unet": {"conv_in": adapter}})) == []
        return
    dense = torch.linalg.svdvals(METHODS[method].delta(adapter, layer).flatten(1))
    torch.testing.assert_close(values[: len(dense)], dense[: len(values)], rtol=1e-3, atol=1e-3)
    (row,) = spectra(Adapter("x", {"unet": {"conv_in": adapter}}))
    assert row.norm == pytest.approx(dense.norm().item(), rel=1e-4)
    assert row.effective_rank == pytest.approx(effective_rank(dense), rel=1e-3)


@pytest.mark.parametrize("method", ["dora", "oft", "ia3", "glora", "vera"])
def test_what_depends_on_the_base_is_as_strong_as_its_dense_delta_there(method: str):
    base = nn.ModuleDict({"mid_block": nn.Linear(24, 40)})
    layer = base["mid_block"]
    adapter = new_method(method).fresh(layer)
    for tensor in adapter.tensors.values():
        if tensor.is_floating_point():
            tensor.normal_()
    (row,) = spectra(Adapter("x", {"unet": {"mid_block": adapter}}), {"unet": base})
    dense = torch.linalg.svdvals(METHODS[method].delta(adapter, layer).flatten(1))
    assert row.norm == pytest.approx(dense.norm().item(), rel=1e-4)
    assert row.effective_rank == pytest.approx(effective_rank(dense), rel=1e-3)
    assert spectra(Adapter("x", {"unet": {"mid_block": adapter}}), {"unet": base.to("meta")}) == []


def test_a_magnitude_needs_the_base():
    layer = nn.Linear(6, 4)
    adapter = new_method("loha", rank=2).fresh(layer)
    bare = singular_values(adapter)
    assert bare is not None
    assert singular_values(replace(adapter, tensors={**adapter.tensors, "magnitude": torch.ones(4)})) is None


def test_ranks_are_counted_for_every_method_that_has_one():
    layer = nn.Linear(64, 64)
    layers = {name: new_method(name, rank=2).fresh(layer) for name in ("lora", "loha", "lokr", "glora", "ia3")}
    rows = cover(Adapter("x", {"unet": layers})).rows
    assert [row.ranks for row in rows] == [{"2": 4}]


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


def test_a_report_goes_to_json_and_back_and_prints_within_eighty_columns():
    pipe = tiny.sd()
    adapter = random_adapters.over(pipe, "unet", "text_encoder")
    adapter.layers["unet"]["nowhere.at.all.with.a.name.that.is.long"] = adapter.layers["unet"]["conv_in"]
    adapter.unused = {"a" * 200: "it is of no use", "unet.x": "neither is it " * 20}
    adapter.metadata = {"modelspec.trigger_phrase": "kiki, " * 30, "ss_seed": "3"}
    adapter.embeddings = {"<kiki>": {"text_encoder": torch.ones(2, 32)}}
    for report in (cover(adapter), cover(adapter, pipe), replace(cover(adapter), hashes={"AutoV2": "0" * 10})):
        assert CoverageReport.from_json(report.to_json()) == report
        assert max(map(len, str(report).splitlines())) <= 80


def test_factors_of_a_matrix_that_no_layer_has_are_not_multiplied_out():
    wide = 200_000
    thin, flat = torch.ones(wide, 1), torch.ones(1, wide)
    loha = {"w1_a": flat, "w1_b": flat, "w2_a": flat, "w2_b": flat} | {f"t{n}": torch.ones(1, 1, 3, 3) for n in (1, 2)}
    lokr = {"w1_a": thin, "w1_b": flat, "w2": torch.ones(2, 2)}
    layers = {"a": LayerAdapter("loha", loha, 1.0), "b": LayerAdapter("lokr", lokr, 1.0)}
    layers["c"] = LayerAdapter("lora", {"down": flat, "up": thin}, 1.0)
    (row,) = spectra(Adapter("x", {"unet": layers}))
    assert (row.layers, row.norm) == (1, pytest.approx(wide, rel=1e-5))


LARGE: dict[str, LayerAdapter] = {
    "lora": LayerAdapter("lora", {"down": torch.randn(128, 150), "up": torch.randn(140, 128)}, 64.0),
    "loha": LayerAdapter(
        "loha",
        {
            part: torch.randn(shape)
            for part, shape in zip(("w1_a", "w1_b", "w2_a", "w2_b"), [(140, 12), (12, 150)] * 2, strict=True)
        },
        6.0,
    ),
    "lokr": LayerAdapter("lokr", {"w1": torch.randn(3, 4), "w2": torch.randn(150, 170)}, 6.0),
    "full": LayerAdapter("full", {"diff": torch.randn(140, 150)}),
}


@pytest.mark.parametrize("method", LARGE)
def test_large_matrices_are_as_strong_as_their_singular_values_and_the_median_stands_for_a_block(method: str):
    layers: dict[str, LayerAdapter] = {}
    for number, factor in enumerate((1.0, 3.0, 2.0)):
        first, *others = LARGE[method].tensors
        kept = {part: LARGE[method].tensors[part] for part in others}
        scaled = {first: LARGE[method].tensors[first].clone() * factor, **kept}
        scaled[first][:number] = 0  # and another effective rank
        layers[f"mid_block.attentions.0.layer_{number}"] = replace(LARGE[method], tensors=scaled)
    adapter = Adapter("a", {"unet": layers})
    (found,) = spectra(adapter)
    every = list(all_values(adapter).values())
    assert found.layers == 3
    assert found.norm == pytest.approx(math.hypot(*(float(values.norm()) for values in every)), rel=1e-5)
    middle = sorted(every, key=lambda values: float(values.norm()))[1]
    assert found.effective_rank == pytest.approx(effective_rank(middle), rel=1e-5)


def test_a_factor_of_a_kronecker_product_that_is_a_pair_costs_what_its_rank_does(monkeypatch: pytest.MonkeyPatch):
    tensors = {"w1": torch.randn(3, 4), "w2_a": torch.randn(150, 5), "w2_b": torch.randn(5, 170)}
    dense = torch.linalg.svdvals(torch.kron(tensors["w1"], tensors["w2_a"] @ tensors["w2_b"]) * 2 / 5)
    sides: list[int] = []
    found = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: sides.append(max(matrix.shape)) or found(matrix))
    (row,) = spectra(Adapter("x", {"unet": {"conv_in": LayerAdapter("lokr", tensors, 2.0)}}))
    assert max(sides) <= 5
    assert row.norm == pytest.approx(float(dense.norm()), rel=1e-5)
    assert row.effective_rank == pytest.approx(effective_rank(dense[:15]), rel=1e-4)
