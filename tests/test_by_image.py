"""A weight for every image of a batch: each as if it were alone, by a merged weight where that pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_diffusion.dial import Dial
from lora_diffusion.errors import ConfigError
from lora_diffusion.gates import Resolved
from lora_diffusion.lora import Slot, place
from lora_diffusion.pairs import Pair
from lora_diffusion.products import WeightByImage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("mixes", [((1.0, 0.0), (0.0, 0.7)), ((0.5, 0.3), (0.2, -1.0)), ((0.0, 0.0), (1.0, 0.0))])
def test_images_with_their_own_mixes_are_each_as_if_alone(mixes: Any, tokens: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(tokens)
    layer = torch.nn.Linear(24, 32).to(dtype)
    frozen = layer.weight
    slot = Slot(layer, [Pair(n, torch.randn(4, 24) / 5, torch.randn(32, 4) / 5, 0.5) for n in "ab"])
    close = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    place(layer, slot)
    x, dial = torch.randn(4, tokens, 24, generator=random).to(dtype), Dial("unet", layer, None)
    with torch.inference_mode():
        dial.bind({"layer": slot}, {name: Resolved(tuple(m[i] for m in mixes)) for i, name in enumerate("ab")})
        merging, outs = list[type](), [layer(x), layer(x)]
        hook = layer.register_forward_pre_hook(lambda one, given: merging.append(type(one.weight)))
        layer(x)
        hook.remove()
        assert (merging == [WeightByImage]) is (tokens * (24 + 32) > 24 * 32)
        for image in range(4):  # the mixes serve the batch twice, as classifier-free guidance has it
            dial.turn({name: Resolved(mixes[image % 2][i]) for i, name in enumerate("ab")})
            alone = layer(x[image : image + 1])
            for out in outs:
                torch.testing.assert_close(out[image : image + 1], alone, **close)
        dial.turn({name: Resolved((1.0, 0.5, 1.0)) for name in "ab"})
        with pytest.raises(ConfigError, match="3 weights by image"):
            layer(x)
    assert layer.weight is frozen
    dial.turn({name: Resolved((1.0, 0.5)) for name in "ab"})
    y = x.clone().requires_grad_()
    layer(y).float().sum().backward()  # what was made in inference mode is not used again here
    assert y.grad is not None


def test_weights_that_would_not_fit_the_bound_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = torch.nn.Linear(24, 32), torch.randn(4, 400, 24)
    slot = Slot(layer, [Pair("a", torch.randn(4, 24) / 5, torch.randn(32, 4) / 5, 0.5)])
    place(layer, slot)
    dial, kinds = Dial("unet", layer, None), list[type]()
    dial.bind({"layer": slot}, {"a": Resolved((0.2, 0.4, 0.6, 0.8))})
    layer.register_forward_pre_hook(lambda one, given: kinds.append(type(one.weight)))
    with torch.inference_mode():
        outs = []
        for bound in (4 * layer.weight.nbytes, 4 * layer.weight.nbytes - 1):
            monkeypatch.setattr("lora_diffusion.products.MOST", bound)
            outs.append(layer(x))
    assert kinds == [WeightByImage, torch.nn.Parameter]
    torch.testing.assert_close(outs[0], outs[1])
