"""The slot: two ways to compute one sum, gradients, and no trace afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.dropping import Dropping
from lora_diffusion.lora import SLOT, Slot, place, slot_of, take_off
from lora_diffusion.pairs import Pair

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), (4, 12)),
    "conv 3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 8, 8)),
    "conv 3x3 stride 2": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "conv 1x1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 4, 4)),
}


def pair(layer: nn.Module, rank: int, name: str = "a", scale: float = 0.7) -> Pair:
    weight = layer.weight
    down = torch.randn(rank, *weight.shape[1:])
    return Pair(name, down, torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2)), scale)


def dense(layer: nn.Module, pairs: list[Pair], weights: list[float]) -> nn.Module:
    """The layer with w · scale · up @ down added to its weight, in float64."""
    merged = copy.deepcopy(layer).double()
    for p, w in zip(pairs, weights, strict=True):
        delta = p.up.double().flatten(1) @ p.down.double().flatten(1)
        merged.weight.data += w * p.scale * delta.view_as(merged.weight)
    return merged


@pytest.fixture(params=LAYERS, ids=str)
def layer_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[request.param]
    return build().requires_grad_(False), torch.randn(shape)


def test_branch_and_merge_equal_the_dense_sum(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    layer, x = layer_and_input
    pairs = [pair(layer, 3, "a"), pair(layer, 2, "b", scale=2.0)]
    slot = Slot(layer, pairs)
    slot.weigh({"a": 0.5, "b": -1.5})
    expected = dense(layer, pairs, [0.5, -1.5])(x.double()).float()
    branch = slot(x, layer(x))
    merged = copy.deepcopy(layer)
    merged.weight.data = slot.merged(layer.weight)
    torch.testing.assert_close(branch, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


def test_many_tokens_take_the_merge_and_few_the_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(16, 16).requires_grad_(False)
    slot = Slot(layer, [pair(layer, 2)])
    place(layer, slot)
    taken: list[str] = []
    merged, forward = slot.merged, slot.forward
    monkeypatch.setattr(slot, "merged", lambda w: taken.append("merge") or merged(w))
    monkeypatch.setattr(slot, "forward", lambda x, out: taken.append("branch") or forward(x, out))
    with torch.no_grad():
        layer(torch.randn(9, 16))  # 9 · 32 > 256
        layer(torch.randn(8, 16))  # 8 · 32 = 256
    assert taken == ["merge", "branch"]


def test_the_weight_comes_back_when_the_layer_raises() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    weight = layer.weight
    place(layer, Slot(layer, [pair(layer, 2)]))
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(torch.randn(64, 5))
    assert layer.weight is weight


def test_gates_by_image_and_token_equal_separate_runs(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    layer, x = layer_and_input
    if x.dim() == 2:
        x = x[:, None]
    slot = Slot(layer, [pair(layer, 2, "a"), pair(layer, 3, "b")])
    rows = torch.rand(len(x), 1, 5)
    slot.gate = rows
    together = slot(x, layer(x))
    for i in range(len(x)):
        slot.gate = rows[i, 0]
        torch.testing.assert_close(together[i : i + 1], slot(x[i : i + 1], layer(x[i : i + 1])), rtol=1e-5, atol=1e-5)


def test_gradients_equal_plain_autograd() -> None:
    layer = nn.Linear(6, 5).requires_grad_(False)
    slot = Slot(layer, [pair(layer, 3)], trainable=True)
    x = torch.randn(2, 4, 6, requires_grad=True)
    slot(x, layer(x)).square().sum().backward()
    ours = [g.clone() for g in (x.grad, slot.down.grad, slot.up.grad)]
    x.grad = slot.down.grad = slot.up.grad = None
    (layer(x) + ((x @ slot.down.t()) * slot.gate) @ slot.up).square().sum().backward()
    for mine, theirs in zip(ours, (x.grad, slot.down.grad, slot.up.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_training_saves_the_input_and_a_row_of_rank_numbers() -> None:
    layer = nn.Linear(32, 32).requires_grad_(False)
    slot = Slot(layer, [pair(layer, 4)], trainable=True)
    x = torch.randn(64, 32, requires_grad=True)
    held: list[tuple[int, int]] = []
    owned = {slot.down.data_ptr(), slot.up.data_ptr(), slot.gate.data_ptr(), layer.weight.data_ptr()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in owned:
            held.append((tensor.data_ptr() if tensor.shape == x.shape else 0, tensor.nbytes))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = layer(x)
        assert slot(x, out) is out  # added in place
    assert sorted(held) == [(0, 64 * 4 * 4), (x.data_ptr(), x.nbytes)]


def test_what_cannot_be_added_to_in_place_gets_the_same_gradients() -> None:
    layer = nn.Linear(8, 8)
    slot, x = Slot(layer, [pair(layer, 4)], trainable=True), torch.randn(3, 5, 8, requires_grad=True)
    found: list[tuple[Tensor, ...]] = []
    for shown in (lambda out: out, lambda out: out.transpose(0, 1).contiguous().transpose(0, 1), lambda out: out[:]):
        out = slot(x, shown(layer(x)))
        wanted = (x, slot.down, slot.up, layer.weight)
        found.append((out, *torch.autograd.grad((out * out.detach()).sum(), wanted)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_dropout_acts_in_rank_space_and_only_while_training() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    slot = Slot(layer, [pair(layer, 4)], trainable=True)
    slot.dropping = Dropping(token=0.5)
    x = torch.randn(3, 8)
    first, second = slot.train()(x, layer(x)), slot(x, layer(x))
    assert not torch.equal(first, second)
    slot.eval()
    torch.testing.assert_close(
        slot(x, layer(x)), dense(layer, [Pair("a", slot.down, slot.up.t(), 0.7)], [1])(x.double()).float()
    )


def test_taking_a_slot_off_leaves_no_trace(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    layer, x = layer_and_input
    before, text, state = layer(x), str(layer), set(vars(layer)) | set(layer._modules)
    place(layer, Slot(layer, [pair(layer, 2)]))
    assert SLOT in layer._modules
    assert not torch.equal(layer(x), before)
    take_off(layer)
    assert (str(layer), set(vars(layer)) | set(layer._modules)) == (text, state)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks_always_called
    assert not layer._forward_hooks_with_kwargs
    assert slot_of(layer) is None
    assert torch.equal(layer(x), before)


def test_weight_zero_is_the_base_bit_for_bit(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    layer, x = layer_and_input
    before = layer(x)
    slot = Slot(layer, [pair(layer, 2)])
    place(layer, slot)
    slot.weigh({"a": 0.0})
    assert torch.equal(layer(x), before)


def test_autocast_training_gives_gradients_in_float32() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
    slot = Slot(layer, [pair(layer, 2)], trainable=True)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    out = slot(x, layer(x))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert slot.down.grad is not None
    assert slot.down.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        slot(x.float(), layer(x)).float().sum().backward()
