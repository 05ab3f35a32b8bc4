"""What is quantised, what stays in 16 bits and why, what that costs, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.quantize import (
    ADALN,
    fingerprint,
    is_quantized,
    quantize,
    weight_bytes,
)
from lora_diffusion.quantize.int8 import Int8Linear
from tests import tiny


def test_odd_widths_get_eight_bits() -> None:
    model = nn.Sequential(nn.Linear(65, 33))
    report = quantize(model, "nf4", compute_dtype=torch.float32)
    assert report.layers[0].stored == "int8"
    assert report.layers[0].reason.startswith("odd width")
    assert model(torch.randn(2, 65)).shape == (2, 33)


def test_t5_feed_forward_output_is_int8_so_that_its_input_is_not_cast_to_bytes() -> None:
    model = tiny.t5(32).eval()
    ids = torch.tensor([[3, 70, 1]])
    true = model(ids)[0]
    quantize(model, "nf4", compute_dtype=torch.float32)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, Int8Linear)
    assert tiny.error(model(ids)[0], true) < 0.35


def test_report_says_what_is_stored_how_and_adds_up() -> None:
    model = tiny.unet()
    parameters = sum(p.numel() for p in model.parameters())
    report = quantize(model, "nf4")
    assert (
        report.parameters - parameters
        == sum(  # 4-bit constants are bytes, not parameters
            row.parameters for row in report.layers
        )
        - parameters
    )
    assert report.parameters == parameters
    assert report.bytes == weight_bytes(model)
    assert {row.stored for row in report.layers} == {"nf4", "bfloat16"}
    reasons = {row.name: row.reason for row in report.kept}
    assert reasons["time_embedding.linear_1"].startswith("embedder")
    assert reasons["conv_in"].startswith("convolution")
    assert reasons["conv_norm_out"].startswith("normalisation")
    text, as_dict = str(report), report.to_dict()
    assert "convolution: there is no 4-bit one" in text
    assert as_dict["bytes"] == report.bytes == sum(group["bytes"] for group in as_dict["groups"])
    assert len(as_dict["layers"]) == len(report.layers)


def test_nf4_takes_about_four_and_an_eighth_bits_a_weight() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    quantize(model, "nf4")
    bits = 8 * weight_bytes(model) / 1024**2
    assert 4.125 < bits < 4.15
    single = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    quantize(single, "nf4", double_quant=False)
    assert 4.5 <= 8 * weight_bytes(single) / 1024**2 < 4.51


def test_flux_keeps_embedders_and_the_last_projection_but_not_proj_out_of_its_blocks() -> None:
    model = tiny.transformer()
    report = quantize(model, "nf4")
    kept = {row.name for row in report.kept if row.kind == "Linear"}
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= kept
    assert is_quantized(model.single_transformer_blocks[0].proj_out)
    assert is_quantized(model.transformer_blocks[0].norm1.linear)


def test_adaln_can_be_kept_or_given_eight_bits() -> None:
    kept, eight = tiny.transformer(), tiny.transformer()
    quantize(kept, "nf4", keep_adaln=True)
    quantize(eight, "nf4", eight_bit=ADALN)
    for block in ("transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.norm.linear"):
        assert not is_quantized(kept.get_submodule(block))
        assert isinstance(eight.get_submodule(block), Int8Linear)
    assert type(eight.transformer_blocks[0].attn.to_q).__name__ == "Linear4bit"


def test_keep_globs_take_in_what_is_below_and_an_unmatched_one_changes_nothing() -> None:
    model = tiny.unet()
    before = fingerprint(model)
    with pytest.raises(TargetError, match=r"'\*\.to_qq' matches no linear layer"):
        quantize(model, "nf4", keep=["*.to_qq"])
    assert fingerprint(model) == before
    quantize(model, "nf4", keep=["mid_block", "*.to_v"])
    assert not any(is_quantized(layer) for layer in model.mid_block.modules())
    assert not any(is_quantized(layer) for name, layer in model.named_modules() if name.endswith("to_v"))
    assert any(is_quantized(layer) for layer in model.down_blocks.modules())


def test_modules_with_their_own_linear_class_and_shared_weights_are_left_alone() -> None:
    model = nn.ModuleDict({"heads": nn.MultiheadAttention(8, 2), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    report = quantize(model, "nf4", compute_dtype=torch.float32)
    reasons = {row.name: row.reason for row in report.layers}
    assert "not a plain linear layer" in reasons["heads.out_proj"]
    assert reasons["a"] == "its weight is shared with another layer"
    assert model["a"].weight is model["b"].weight
    assert report.bytes == weight_bytes(model)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_dtype_as_precision_only_casts_and_freezes(precision: str, dtype: torch.dtype) -> None:
    model = tiny.unet().requires_grad_(True)
    report = quantize(model, precision)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())
    assert report.quantized == ()
    assert report.bytes == weight_bytes(model)


def test_unknown_precision_block_size_and_device_are_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"precision is 'nf8'.*did you mean"):
        quantize(model, "nf8")
    with pytest.raises(ConfigError, match="block_size is 65"):
        quantize(model, "nf4", block_size=65)
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        quantize(model, "nf4", device="gpu")
    assert not is_quantized(model[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="sees no CUDA GPU"):
        quantize(model, "nf4", device="cuda")
    assert not is_quantized(model[0])


def test_missing_bitsandbytes_is_one_sentence_and_int8_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        quantize(model, "nf4")
    quantize(model, "int8")
    assert is_quantized(model[0])


def test_a_layer_with_adapters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].add_module("adapters", nn.Identity())
    with pytest.raises(ConfigError, match="'0' has adapters on it"):
        quantize(model, "nf4")
