"""What every registered method promises, plugins included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_diffusion.lora import Slot, place
from lora_diffusion.methods import METHODS, Method
from lora_diffusion.quantize import quantize

LAYERS = {"linear": lambda: nn.Linear(16, 24), "conv": lambda: nn.Conv2d(8, 12, 3, padding=1)}
INPUTS = {"linear": (2, 5, 16), "conv": (2, 8, 6, 6)}


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> type[Method]:
    return METHODS[request.param]


@pytest.mark.parametrize("kind", LAYERS)
def test_fresh_changes_nothing(method: type[Method], kind: str) -> None:
    layer = LAYERS[kind]()
    if not method.supports(layer):
        pytest.skip(f"{method.name} is not defined on {kind} layers")
    fresh = method().fresh(layer)
    assert not method.delta(fresh, layer).any()
    assert method.check(fresh, layer) is None
    assert (
        {name for name, required in method.tensors.items() if required} <= fresh.tensors.keys() <= method.tensors.keys()
    )
    x = torch.randn(INPUTS[kind])
    before = layer(x)
    place(layer, Slot(layer, [method.pair("new", fresh)], trainable=True))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_equals_the_dense_delta(method: type[Method], kind: str) -> None:
    layer = LAYERS[kind]().requires_grad_(False)
    if not method.supports(layer):
        pytest.skip(f"{method.name} is not defined on {kind} layers")
    adapter = method().fresh(layer)
    for tensor in adapter.tensors.values():
        tensor.normal_()
    x = torch.randn(INPUTS[kind])
    slotted = Slot(layer, [method.pair("a", adapter)])(x, layer(x))
    layer.weight.data += method.delta(adapter, layer)
    torch.testing.assert_close(slotted, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_trains_over_quantised_layers(method: type[Method], precision: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize(model, precision, compute_dtype=torch.float32)
    slot = Slot(model[0], [method.pair("a", method().fresh(model[0]))], trainable=True)
    place(model[0], slot)
    model(torch.randn(3, 64)).square().sum().backward()
    assert slot.up.grad is not None
    assert slot.up.grad.abs().sum() > 0


def test_a_wrong_shape_is_named(method: type[Method]) -> None:
    fresh = method().fresh(nn.Linear(16, 24))
    fault = method.check(fresh, nn.Linear(16, 25))
    assert fault is not None
    assert "expected" in fault
