"""Frozen 4-bit and 8-bit backbones: bounds, bit-equality, no byte changed, saved and loaded, what is kept."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.quantize import (
    ADALN,
    dequantize,
    fingerprint,
    is_quantized,
    load_quantized,
    quantize,
    save_quantized,
    weight_bytes,
)
from lora_diffusion.quantize.int8 import Int8Linear
from tests import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _unet() -> UNet2DConditionModel:
    return tiny.sd().unet


def _flux() -> FluxTransformer2DModel:
    return tiny.flux().transformer


def _run(model: nn.Module, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(3)
    if isinstance(model, UNet2DConditionModel):
        x = torch.randn(2, 4, 16, 16, generator=random).to(dtype)
        return model(x, torch.tensor([10, 500]), torch.randn(2, 7, 32, generator=random).to(dtype)).sample
    return model(
        hidden_states=torch.randn(1, 16, 16, generator=random).to(dtype),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=random).to(dtype),
        pooled_projections=torch.randn(1, 32, generator=random).to(dtype),
        timestep=torch.tensor([0.5]).to(dtype),
        guidance=torch.tensor([3.5]).to(dtype),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def _error(found: Tensor, true: Tensor) -> float:
    return ((found.float() - true.float()).norm() / true.float().norm()).item()


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
    assert _error(dense, weight) < bound
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


def test_odd_widths_get_eight_bits() -> None:
    model = _linear(65, 33)
    report = quantize(model, "nf4", compute_dtype=torch.float32)
    assert report.layers[0].stored == "int8"
    assert report.layers[0].reason.startswith("odd width")
    assert model(torch.randn(2, 65)).shape == (2, 33)


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
@pytest.mark.parametrize("build", [_unet, _flux])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_draws_nearly_the_same_and_training_changes_no_byte(build, precision: str, dtype: torch.dtype) -> None:
    model = build()
    true = _run(model, torch.float32)
    quantize(model, precision, compute_dtype=dtype)
    before = fingerprint(model)
    down = nn.Parameter(torch.randn(1, 8) * 0.1)
    model.train()
    found = _run(model, dtype)
    assert found.dtype == dtype
    assert _error(found, true) < (0.35 if precision == "nf4" else 0.05)
    x = torch.randn(4, model.get_submodule(_inner(model)).in_features, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([down], lr=0.1)
    (model.get_submodule(_inner(model))(x).float().sum() * down.sum()).backward()
    optimizer.step()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():  # bitsandbytes alone would repack its bytes here
        assert torch.equal(_run(model, dtype), found)
    assert fingerprint(model) == before


def _inner(model: nn.Module) -> str:
    return next(name for name, layer in model.named_modules() if is_quantized(layer))


def test_gradient_reaches_the_input_of_a_quantised_unet() -> None:
    model = _unet()
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


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("on_meta", [True, False])
def test_saved_model_comes_back_bit_for_bit(tmp_path: Path, precision: str, on_meta: bool) -> None:
    model = _flux()
    quantize(model, precision, eight_bit=ADALN)
    path = save_quantized(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    fresh = FluxTransformer2DModel.from_config(model.config)
    if on_meta:
        fresh.to("meta")
    report = load_quantized(fresh.eval(), tmp_path)
    assert fingerprint(fresh) == fingerprint(model)
    assert report.bytes == weight_bytes(model)
    assert not any(p.requires_grad for p in fresh.parameters())
    assert torch.equal(_run(fresh, torch.bfloat16), _run(model, torch.bfloat16))


def test_tied_weights_stay_tied_through_quantising_and_disk(tmp_path: Path) -> None:
    model, fresh = tiny.t5(32).eval(), tiny.t5(32).eval()
    quantize(model, "nf4")
    save_quantized(model, tmp_path)
    load_quantized(fresh, tmp_path)
    assert fresh.shared.weight is fresh.encoder.embed_tokens.weight
    assert fingerprint(fresh) == fingerprint(model)
    ids = torch.tensor([[3, 70, 1]])
    assert torch.equal(fresh(ids)[0], model(ids)[0])


def test_t5_feed_forward_output_is_int8_so_that_its_input_is_not_cast_to_bytes() -> None:
    model = tiny.t5(32).eval()
    ids = torch.tensor([[3, 70, 1]])
    true = model(ids)[0]
    quantize(model, "nf4", compute_dtype=torch.float32)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, Int8Linear)
    assert _error(model(ids)[0], true) < 0.35


def test_report_says_what_is_stored_how_and_adds_up() -> None:
    model = _unet()
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
    model = _flux()
    report = quantize(model, "nf4")
    kept = {row.name for row in report.kept if row.kind == "Linear"}
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= kept
    assert is_quantized(model.single_transformer_blocks[0].proj_out)
    assert is_quantized(model.transformer_blocks[0].norm1.linear)


def test_adaln_can_be_kept_or_given_eight_bits() -> None:
    kept, eight = _flux(), _flux()
    quantize(kept, "nf4", keep_adaln=True)
    quantize(eight, "nf4", eight_bit=ADALN)
    for block in ("transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.norm.linear"):
        assert not is_quantized(kept.get_submodule(block))
        assert isinstance(eight.get_submodule(block), Int8Linear)
    assert type(eight.transformer_blocks[0].attn.to_q).__name__ == "Linear4bit"


def test_keep_globs_take_in_what_is_below_and_an_unmatched_one_changes_nothing() -> None:
    model = _unet()
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
    model = _unet().requires_grad_(True)
    report = quantize(model, precision)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())
    assert report.quantized == ()
    assert report.bytes == weight_bytes(model)


def test_dequantize_reads_plain_layers_and_those_of_bitsandbytes() -> None:
    import bitsandbytes as bnb

    conv = nn.Conv2d(3, 4, 3)
    assert torch.equal(dequantize(conv), conv.weight)
    plain = nn.Linear(64, 64)
    four = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(plain.weight.detach().clone(), quant_type="nf4", module=four)
    four.to("cpu")
    dense = dequantize(four)
    assert _error(dense, plain.weight) < 0.12
    four.eval()
    with torch.no_grad():
        four(torch.randn(1, 64))  # on CPUs with AVX512-BF16 this repacks the layer and rounds its constants
    assert _error(dequantize(four), dense) < 0.01
    eight = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(plain.weight.detach().clone(), requires_grad=False)
    eight.to("cpu")
    for _ in range(2):
        assert _error(dequantize(eight), plain.weight) < 0.008
        eight(torch.randn(1, 64))
    assert is_quantized(four)
    assert is_quantized(eight)


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


def test_files_that_are_no_saved_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_quantized(_unet(), tmp_path)
    model = nn.Sequential(nn.Linear(64, 4))
    quantize(model, "nf4")
    path = save_quantized(model, tmp_path)
    with pytest.raises(ConfigError, match="belongs to another model"):
        load_quantized(nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 4)), tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_quantized(nn.Sequential(nn.Linear(64, 4)), tmp_path)


def test_the_notice_about_an_optional_package_is_silenced_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no")
    logger.warning("something that matters")
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]
