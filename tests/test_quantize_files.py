"""A quantised model goes to disk and comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.pipelines import load_for_drawing, load_pipeline
from lora_diffusion.quantize import (
    ADALN,
    fingerprint,
    load_quantized,
    quantize,
    save_quantized,
    weight_bytes,
)
from tests import tiny


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("on_meta", [True, False])
def test_saved_model_comes_back_bit_for_bit(tmp_path: Path, precision: str, on_meta: bool) -> None:
    model = tiny.transformer()
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
    assert torch.equal(tiny.predict(fresh, torch.bfloat16), tiny.predict(model, torch.bfloat16))


def test_tied_weights_stay_tied_through_quantising_and_disk(tmp_path: Path) -> None:
    model, fresh = tiny.t5(32).eval(), tiny.t5(32).eval()
    quantize(model, "nf4")
    save_quantized(model, tmp_path)
    load_quantized(fresh, tmp_path)
    assert fresh.shared.weight is fresh.encoder.embed_tokens.weight
    assert fingerprint(fresh) == fingerprint(model)
    ids = torch.tensor([[3, 70, 1]])
    assert torch.equal(fresh(ids)[0], model(ids)[0])


def test_files_that_are_no_saved_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_quantized(tiny.unet(), tmp_path)
    model = nn.Sequential(nn.Linear(64, 4))
    quantize(model, "nf4")
    path = save_quantized(model, tmp_path)
    with pytest.raises(ConfigError, match="belongs to another model"):
        load_quantized(nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 4)), tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_quantized(nn.Sequential(nn.Linear(64, 4)), tmp_path)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_base_with_a_saved_denoiser_is_opened_as_it_was_saved(tmp_path: Path, precision: Any) -> None:
    tiny.sd().save_pretrained(tmp_path / "whole")
    made = load_pipeline(tmp_path / "whole", precision=precision, compute="bf16", device="cpu")
    made.pipe.save_pretrained(tmp_path / "small")
    for dense in (tmp_path / "small" / "unet").glob("*.safetensors"):
        dense.unlink()
    save_quantized(made.pipe.unet, tmp_path / "small" / "unet")
    for again in (
        load_pipeline(tmp_path / "small", precision=precision, device="cpu"),
        load_for_drawing(tmp_path / "small", None, "cpu"),
    ):
        assert fingerprint(again.pipe.unet) == fingerprint(made.pipe.unet)
        assert (again.dtype, again.pipe.vae.dtype) == (torch.bfloat16, torch.bfloat16)
        assert again.report is not None
        assert again.report.bytes == weight_bytes(made.pipe.unet)
        np.testing.assert_array_equal(tiny.picture(again.pipe), tiny.picture(made.pipe))
    for asked in ({"precision": "fp32"}, {"precision": precision, "compute": "fp16"}):
        with pytest.raises(ConfigError, match=f"unet in {precision}, computing in bfloat16; "):
            load_pipeline(tmp_path / "small", device="cpu", **asked)
    (tmp_path / "small" / "unet" / "quantized.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read as a quantised model"):
        load_pipeline(tmp_path / "small", precision=precision, device="cpu")
