"""Frozen 4-bit and 8-bit backbones: bounds, bit-equality, no byte changed, saved and loaded, what is kept."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_diffusion.quantize import (
    dequantize,
    fingerprint,
    is_quantized,
    quantize,
)
from tests import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _linear(inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))


@pytest.mark.parametrize(("precision", "bound"), [("nf4", 0.12), ("int8", 0.008)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 32, True), (66, 33, True), (6, 3, False), (2, 1, True)])
def test_weight_error_is_bounded_and_product_equals_the_dequantised_one(
    precision: str, bound: float, dtype: torch.dtype, inputs: int, outputs: int, bias: bool
) -> None:
    model = _linear(inputs, outputs, bias=bias, dtype=dtype)
    weight = model[0].weight.detach().clone()
    quantize(model, precision, compute_dtype=dtype)
    assert is_quantized(model[0])
    assert isinstance(model[0], nn.Linear)
    assert not any(p.requires_grad for p in model.parameters())
    dense = dequantize(model[0])
    assert dense.dtype == torch.float32
    assert dense.shape == weight.shape
    assert tiny.error(dense, weight) < bound
    for training in (True, False):
        model.train(training)
        x = torch.randn(2, 5, inputs, dtype=dtype, requires_grad=True)
        with torch.no_grad():
            quiet = model(x)
        y = model(x)
        expected = F.linear(x, dequantize(model[0], dtype), model[0].bias)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        assert torch.equal(y, expected)
        assert torch.equal(quiet, expected)
        assert torch.equal(x.grad, gradient @ dequantize(model[0], dtype))


def test_int8_keeps_rows_of_zeros_and_the_largest_value_of_a_row() -> None:
    layer = nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, "int8", compute_dtype=torch.float32)
    dense = dequantize(model[0])
    assert torch.equal(dense[1], torch.zeros(16))
    assert torch.allclose(dense.abs().amax(1), layer.weight.abs().amax(1))
    assert (dense - layer.weight).abs().max() <= layer.weight.abs().max() / 254 * 1.001


def test_int8_numbers_survive_a_change_of_dtype() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    quantize(model, "int8", compute_dtype=torch.float32)
    before = dequantize(model[0])
    assert torch.equal(dequantize(model.half()[0]), before)
    assert model(torch.randn(2, 16).half()).dtype == torch.float16


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("build", [tiny.unet, tiny.transformer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_draws_nearly_the_same_and_training_changes_no_byte(build, precision: str, dtype: torch.dtype) -> None:
    model = build()
    true = tiny.predict(model, torch.float32)
    quantize(model, precision, compute_dtype=dtype)
    before = fingerprint(model)
    down = nn.Parameter(torch.randn(1, 8) * 0.1)
    model.train()
    found = tiny.predict(model, dtype)
    assert found.dtype == dtype
    assert tiny.error(found, true) < (0.35 if precision == "nf4" else 0.05)
    x = torch.randn(4, model.get_submodule(_inner(model)).in_features, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([down], lr=0.1)
    (model.get_submodule(_inner(model))(x).float().sum() * down.sum()).backward()
    optimizer.step()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():  # bitsandbytes alone would repack its bytes here
        assert torch.equal(tiny.predict(model, dtype), found)
    assert fingerprint(model) == before


def _inner(model: nn.Module) -> str:
    return next(name for name, layer in model.named_modules() if is_quantized(layer))


def test_gradient_reaches_the_input_of_a_quantised_unet() -> None:
    model = tiny.unet()
    quantize(model, "nf4", compute_dtype=torch.float32)
    x = torch.randn(1, 4, 16, 16, requires_grad=True)
    model(x, 5, torch.randn(1, 7, 32)).sample.square().mean().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


def test_fingerprint_sees_every_bit_and_ignores_adapters() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    quantize(model, "nf4")
    before = fingerprint(model)
    model[0].add_module("adapters", nn.Linear(4, 4))
    assert fingerprint(model) == before
    state = model[0].weight.quant_state
    for tensor in (
        model[0].weight.data,
        state.absmax,
        state.state2.absmax,
        state.offset,
        model[0].bias.data,
        model[1].bias.data,
    ):
        bytes_of = tensor.reshape(-1).view(torch.uint8)
        bytes_of[0] ^= 1
        assert fingerprint(model) != before
        bytes_of[0] ^= 1
    assert fingerprint(model) == before


def test_dequantize_reads_plain_layers_and_those_of_bitsandbytes() -> None:
    import bitsandbytes as bnb

    conv = nn.Conv2d(3, 4, 3)
    assert torch.equal(dequantize(conv), conv.weight)
    plain = nn.Linear(64, 64)
    four = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(plain.weight.detach().clone(), quant_type="nf4", module=four)
    four.to("cpu")
    dense = dequantize(four)
    assert tiny.error(dense, plain.weight) < 0.12
    four.eval()
    with torch.no_grad():
        four(torch.randn(1, 64))  # on CPUs with AVX512-BF16 this repacks the layer and rounds its constants
    assert tiny.error(dequantize(four), dense) < 0.01
    eight = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(plain.weight.detach().clone(), requires_grad=False)
    eight.to("cpu")
    for _ in range(2):
        assert tiny.error(dequantize(eight), plain.weight) < 0.008
        eight(torch.randn(1, 64))
    assert is_quantized(four)
    assert is_quantized(eight)


def test_the_notice_about_an_optional_package_is_silenced_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no")
    logger.warning("something that matters")
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_layers_are_quantised_in_pieces_with_the_same_bits(double_quant: bool, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    model = nn.Sequential(nn.Linear(1026, 1100, bias=False, dtype=dtype))
    whole = bnb.nn.Linear4bit(1026, 1100, bias=False, compress_statistics=double_quant, quant_type="nf4")
    weight = model[0].weight.detach().clone()
    whole.weight = bnb.nn.Params4bit(weight, compress_statistics=double_quant, quant_type="nf4", module=whole)
    whole.to("cpu")
    quantize(model, "nf4", double_quant=double_quant, compute_dtype=dtype)
    assert weight.numel() > 2**20
    assert fingerprint(model) == fingerprint(nn.Sequential(whole))
