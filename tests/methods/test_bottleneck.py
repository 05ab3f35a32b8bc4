"""Serial bottleneck adapters against the same in plain torch, and that nothing pretends they are a matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from lora_diffusion import AdapterStack, ConfigError, TrainConfig, load_adapter, merge, train
from lora_diffusion.attachment import attach
from lora_diffusion.methods.bottleneck import Bottleneck
from lora_diffusion.quantize import fingerprint
from tests import tiny
from tests.methods.test_in_use import random_adapter
from tests.training.pictures import settings


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_output_and_gradients_are_those_of_plain_torch(kind: str) -> None:
    layer = nn.Linear(16, 24) if kind == "linear" else nn.Conv2d(8, 24, 3, stride=2)
    x = torch.randn(2, *((5, 16) if kind == "linear" else (8, 9, 9)))
    down, up = nn.Linear(24, 6), nn.Linear(6, 24)
    with attach(nn.ModuleDict({"layer": layer}), Bottleneck(6, 9.0), "layer") as attachment:
        held = {name.removeprefix("layer."): p for name, p in attachment.named_parameters()}
        theirs = {"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
        for key, parameter in held.items():
            parameter.data.copy_(theirs[key].detach())
        found = layer(x)
        y = layer.forward(x)
        rows = y if kind == "linear" else y.movedim(1, -1)
        change = 1.5 * up(nn.functional.gelu(down(rows)))
        expected = y + (change if kind == "linear" else change.movedim(-1, 1))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.square().sum().backward()
        expected.square().sum().backward()
        for key, parameter in held.items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-4, atol=1e-4)


def test_it_cannot_be_fused_or_merged_and_nothing_is_half_done() -> None:
    pipe = tiny.sd()
    adapter, pair = random_adapter(pipe, "bottleneck"), random_adapter(pipe, "lora")
    before = fingerprint(pipe.unet)
    with AdapterStack(pipe) as stack:
        stack.add(pair)
        stack.add(adapter, 0.5)
        stack.compose(balance=True)  # it has no norm to even out
        apart = tiny.picture(pipe)
        with pytest.raises(ConfigError, match="bottleneck"):
            stack.fuse()
        assert fingerprint(pipe.unet) == before
        np.testing.assert_array_equal(tiny.picture(pipe), apart)
    with pytest.raises(ConfigError, match="not linear"):
        merge([adapter], base=pipe)


def test_it_trains_from_a_configuration_over_nf4_and_is_drawn(tmp_path: Path) -> None:
    given = settings(tmp_path, lr=3e-2, steps=3)
    given["adapter"] |= {"method": "bottleneck", "targets": ["*.to_out.0", "*.ff.net.2"]}
    result = train(TrainConfig.parse(given))
    assert result.adapter is not None
    assert result.backbone_unchanged
    adapter = load_adapter(result.adapter)
    assert (adapter.methods, adapter.spelling) == ({"bottleneck"}, "kohya")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain = tiny.picture(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        assert np.abs(tiny.picture(pipe) - plain).max() > 1e-3
    np.testing.assert_array_equal(tiny.picture(pipe), plain)
