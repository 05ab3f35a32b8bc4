"""A quantised model goes to disk and comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from lora_diffusion.errors import ConfigError
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
