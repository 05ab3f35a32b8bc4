"""What every registered method promises, plugins included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lora_diffusion import Adapter, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.attachment import attach
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats import FORMATS
from lora_diffusion.lora import Slot, place, take_off
from lora_diffusion.methods import METHODS, Method, is_dense, new_method
from lora_diffusion.quantize import quantize

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 24),
    "conv": lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2),
    "conv3d": lambda: nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1), stride=(1, 2, 1)),
    "norm": lambda: nn.LayerNorm(16),
    "attn": lambda: Attention(16, heads=2, dim_head=12),
}
INPUTS = {"linear": (2, 5, 16), "conv": (2, 8, 6, 6), "conv3d": (2, 8, 3, 6, 6), "norm": (2, 5, 16), "attn": (2, 5, 16)}
#: a layer of each kind that is one output wider
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 25),
    "conv": lambda: nn.Conv2d(8, 13, 3),
    "conv3d": lambda: nn.Conv3d(8, 13, (1, 3, 3)),
    "norm": lambda: nn.LayerNorm(17),
    "attn": lambda: Attention(16, heads=2, dim_head=13),
}


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> type[Method]:
    return METHODS[request.param]


def kinds_of(method: type[Method]) -> list[str]:
    return [kind for kind, make in LAYERS.items() if method.supports(make())]


def settings(method: type[Method]) -> Method:
    return new_method(method.name, rank=4)


def random(method: type[Method], layer: nn.Module) -> LayerAdapter:
    adapter = settings(method).fresh(layer)
    for tensor in adapter.tensors.values():
        if tensor.is_floating_point():
            tensor.normal_()
    return adapter


def weight_only(adapter: LayerAdapter) -> LayerAdapter:
    """Without what it adds to the bias."""
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if key not in ("b_norm", "diff_b")}
    return replace(adapter, tensors=tensors)


def with_slot(layer: nn.Module, method: type[Method], adapter: LayerAdapter, weight: float = 1.0) -> Slot:
    slot = Slot(layer, [method.part("a", adapter, layer)])
    slot.weigh({"a": weight})
    place(layer, slot)
    return slot


def spelling_of(adapter: Adapter) -> str:
    """kohya, which can say every built-in method; for one from outside the first format that can."""

    def can(name: str) -> bool:
        try:
            FORMATS[name].dump(adapter)
        except AdapterFileError:
            return False
        return True

    return next(name for name in ("kohya", *FORMATS) if can(name))


def called(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def test_it_is_defined_on_something(method: type[Method]) -> None:
    assert kinds_of(method)


def test_fresh_changes_nothing(method: type[Method]) -> None:
    """Bit for bit, in training and in inference; DoRA's magnitude is its norm to rounding, and here to the bit."""
    for kind in kinds_of(method):
        layer = LAYERS[kind]()
        fresh = settings(method).fresh(layer)
        if is_dense(method.name):
            assert method.delta(fresh, layer).abs().max() < 1e-6
        assert method.check(fresh, layer) is None
        required = {name for name, needed in method.tensors.items() if needed}
        assert required <= fresh.tensors.keys() <= method.tensors.keys()
        x = torch.randn(INPUTS[kind])
        before = layer(x)
        for trainable in (True, False):
            place(layer, Slot(layer, [method.part("new", fresh, layer)], trainable=trainable))
            assert torch.equal(layer(x), before)
            take_off(layer)


def test_it_is_planned_without_weights(method: type[Method]) -> None:
    """As many parameters on a model of the meta device as on a real one; a plan of the memory begins so."""
    counts: list[int] = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = nn.ModuleDict({kind: LAYERS[kind]() for kind in kinds_of(method)})
        with attach(model, settings(method), list(model)) as attachment:
            counts.append(sum(parameter.numel() for parameter in attachment.parameters()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
def test_forward_is_the_base_and_weight_times_the_dense_delta(method: type[Method], weight: float) -> None:
    if not is_dense(method.name):
        pytest.skip("it is no change of a weight")
    for kind in kinds_of(method):
        layer = LAYERS[kind]().requires_grad_(False)
        adapter = weight_only(random(method, layer))
        x = torch.randn(INPUTS[kind])
        slot = with_slot(layer, method, adapter, weight)
        slotted, trained = called(layer, x), layer(x)
        assert slot is take_off(layer)
        layer.weight.data += weight * method.delta(adapter, layer)
        torch.testing.assert_close(slotted, layer(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trained, layer(x), rtol=1e-4, atol=1e-4)


def test_at_weight_0_and_after_it_came_off_the_layer_is_the_base_to_the_bit(method: type[Method]) -> None:
    for kind in kinds_of(method):
        layer = LAYERS[kind]()
        tree, weights = repr(layer), {key: value.clone() for key, value in layer.state_dict().items()}
        x = torch.randn(INPUTS[kind])
        before = called(layer, x)
        slot = with_slot(layer, method, random(method, layer))
        assert not torch.equal(called(layer, x), before)
        slot.weigh({"a": 0.0})
        assert torch.equal(called(layer, x), before)
        take_off(layer)
        assert torch.equal(called(layer, x), before)
        assert repr(layer) == tree
        assert all(torch.equal(value, weights[key]) for key, value in layer.state_dict().items())


def test_it_stacks_beside_a_low_rank_pair_by_addition(method: type[Method]) -> None:
    if "linear" not in kinds_of(method):
        pytest.skip("LoRA is not defined on its layers")
    lora = METHODS["lora"]
    layer = nn.Linear(16, 24).requires_grad_(False)
    ours, theirs, x = random(method, layer), random(lora, layer), torch.randn(2, 300, 16)
    base = called(layer, x)
    shares = []
    for kind, adapter in ((method, ours), (lora, theirs)):
        with_slot(layer, kind, adapter)
        shares.append(called(layer, x) - base)
        take_off(layer)
    slot = Slot(layer, [lora.part("l", theirs, layer), method.part("o", ours, layer)])
    slot.weigh({"l": -0.5, "o": 0.75})
    place(layer, slot)
    expected = base + 0.75 * shares[0] - 0.5 * shares[1]
    torch.testing.assert_close(called(layer, x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_tensor_on_every_kind_of_layer(method: type[Method]) -> None:
    """Away from its start, and in any precision of the activations that the layer itself computes in."""
    for kind in kinds_of(method):
        for dtype in (torch.float32, torch.bfloat16):
            layer = LAYERS[kind]().to(dtype).requires_grad_(False)
            slot = Slot(layer, [method.part("a", random(method, layer), layer)], trainable=True)
            place(layer, slot)
            x = torch.randn(INPUTS[kind], dtype=dtype, requires_grad=True)
            layer(x).float().square().sum().backward()
            trained = [parameter for parameter in slot.parameters() if parameter.requires_grad]
            assert trained
            assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
            assert x.grad is not None
            assert not any(p.requires_grad for p in layer.parameters(recurse=False))


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_trains_over_quantised_layers(method: type[Method], precision: str) -> None:
    """Gradients reach every tensor once the layer is away from its start, and the input through it."""
    if not {"linear", "attn"} & set(kinds_of(method)):
        pytest.skip("only linear layers are quantised")
    whole = "attn" in kinds_of(method)
    model = nn.Sequential(Attention(64, heads=2, dim_head=32) if whole else nn.Linear(64, 64), nn.Linear(64, 64))
    quantize(model, precision, compute_dtype=torch.float32)
    adapter = random(method, model[0])
    slot = Slot(model[0], [method.part("a", adapter, model[0])], trainable=True)
    place(model[0], slot)
    x = torch.randn(2, 3, 64, requires_grad=True)
    model(x).square().sum().backward()
    trained = [parameter for parameter in slot.parameters() if parameter.requires_grad]
    floating = [tensor for tensor in adapter.tensors.values() if tensor.is_floating_point()]
    assert len(trained) == len(floating)
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert x.grad is not None
    slot.weigh({"a": 0.0})
    assert all(p.grad is None for p in model.parameters() if not any(p is one for one in trained))


def test_forward_over_nf4_is_that_of_the_dequantised_weight(method: type[Method]) -> None:
    if not is_dense(method.name):
        pytest.skip("it is no change of a weight")
    if "linear" not in kinds_of(method):
        pytest.skip("only linear layers are quantised")
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model, "nf4", compute_dtype=torch.float32)
    layer, x = model[0], torch.randn(3, 64)
    adapter = weight_only(random(method, layer))
    base = called(layer, x)
    with_slot(layer, method, adapter)
    change = called(layer, x) - base
    torch.testing.assert_close(change, x @ method.delta(adapter, layer).t(), rtol=1e-3, atol=1e-3)


def test_a_wrong_shape_is_named(method: type[Method]) -> None:
    for kind in kinds_of(method):
        fault = method.check(settings(method).fresh(LAYERS[kind]()), OTHERS[kind]())
        assert fault is not None
        assert "expected" in fault


def test_one_step_of_training_saved_and_loaded_computes_the_same(method: type[Method], tmp_path: Path) -> None:
    if not {"linear", "attn"} & set(kinds_of(method)):
        pytest.skip("targets are linear layers, convolutions and attentions")
    whole = "attn" in kinds_of(method)
    first = Attention(16, heads=2, dim_head=12) if whole else nn.Linear(16, 24)
    model = nn.ModuleDict({"to_q": first, "conv": nn.Conv2d(8, 12, 3)})
    targets = ["to_q", "conv"] if "conv" in kinds_of(method) else ["to_q"]
    with attach(model, settings(method), targets, component="transformer") as attachment:
        x = torch.randn(2, 5, 16)
        optimizer = torch.optim.SGD(attachment.groups(0.1, up_ratio=4.0), lr=0.1)
        (model["to_q"](x) - 1).square().sum().backward()
        optimizer.step()
        adapter, trained = attachment.adapter("mine"), model["to_q"](x)
        attachment.load(adapter)
        assert torch.equal(model["to_q"](x), trained)
        assert attachment.adapter("again") == adapter
    again = load_adapter(save_adapter(adapter, tmp_path / "a.safetensors", format=spelling_of(adapter)))
    assert again == adapter
    layer = again.layers["transformer"]["to_q"]
    with_slot(model["to_q"], METHODS[layer.method], layer)
    torch.testing.assert_close(called(model["to_q"], x), trained.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(trained, model["to_q"].forward(x))
    assert adapter.methods == {"lora" if hasattr(method, "written") else method.name}
