"""The same tensors in LyCORIS and in PEFT compute the same: dense changes against theirs, forwards against theirs."""

from __future__ import annotations

import pytest
import torch
from lycoris.functional import boft, diag_oft, locon, loha, lokr
from lycoris.functional.general import factorization as their_factorization
from lycoris.functional.general import weight_decompose
from lycoris.modules.glora import _glora_weight
from lycoris.modules.ia3 import _ia3_weight
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.attachment import attach
from lora_diffusion.layers import weight_shape
from lora_diffusion.lora import Slot, place, take_off
from lora_diffusion.methods import METHODS
from lora_diffusion.methods.dora import DoRA
from lora_diffusion.methods.glora import in_order
from lora_diffusion.methods.loha import LoHa
from lora_diffusion.methods.lokr import LoKr, factorization
from lora_diffusion.methods.oft import OFT
from lora_diffusion.quantize import quantize

LAYERS = {"linear": lambda: nn.Linear(16, 24), "conv": lambda: nn.Conv2d(8, 12, 3, padding=1)}


def random(layer: nn.Module, adapter: LayerAdapter) -> LayerAdapter:
    for tensor in adapter.tensors.values():
        tensor.normal_()
    return adapter


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tucker", [False, True])
def test_loha(kind: str, tucker: bool) -> None:
    layer = LAYERS[kind]()
    adapter = random(layer, LoHa(3, 5.0, tucker=tucker).fresh(layer))
    t = adapter.tensors
    down = [t[key] if "t1" in t else t[key].reshape(3, *weight_shape(layer)[1:]) for key in ("w1_b", "w2_b")]
    theirs = loha.diff_weight(down[0], t["w1_a"], down[1], t["w2_a"], t.get("t1"), t.get("t2"), gamma=5 / 3)
    assert ("t1" in t) == (tucker and kind == "conv")
    close(LoHa.delta(adapter, layer), theirs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "method",
    [LoKr(99), LoKr(2, 5.0, factor=2), LoKr(1, 5.0, factor=4, both=True), LoKr(2, 5.0, factor=2, tucker=True)],
)
def test_lokr(kind: str, method: LoKr) -> None:
    layer = LAYERS[kind]()
    adapter = random(layer, method.fresh(layer))
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    divisor = next((adapter.tensors[key].shape[1] for key in ("w1_a", "w2_a") if key in adapter.tensors), 1)
    gamma = LoKr.scale(adapter) * divisor  # by which theirs divides, in Tucker form the wrong side for the rank
    theirs = lokr.diff_weight(*(adapter.tensors.get(name) for name in names), gamma=gamma)
    close(LoKr.delta(adapter, layer), theirs)
    made = lokr.weight_gen(
        layer.weight,
        method.rank,
        tucker=method.tucker and kind == "conv",
        factor=method.factor,
        decompose_both=method.both,
    )
    shapes = {name: tensor.shape for name, tensor in zip(names, made, strict=True) if tensor is not None}
    assert shapes == {name: tensor.shape for name, tensor in adapter.tensors.items()}


def test_an_alpha_beside_two_whole_factors_means_nothing() -> None:
    layer = nn.Linear(16, 24)
    adapter = random(layer, LoKr(99, 1e9).fresh(layer))
    assert adapter.tensors.keys() == {"w1", "w2"}
    assert LoKr.scale(adapter) == 1.0


def test_a_lokr_of_early_lycoris_with_the_kernel_in_its_columns() -> None:
    layer = nn.Conv2d(8, 12, 3)
    first, second = torch.randn(3, 6), torch.randn(4, 12)
    adapter = LayerAdapter("lokr", {"w1": first, "w2": second})
    assert LoKr.check(adapter, layer) is None
    close(LoKr.delta(adapter, layer), torch.kron(first, second))


@pytest.mark.parametrize("size", [1, 12, 127, 128, 250, 360, 512, 1280])
@pytest.mark.parametrize("bound", [-1, 2, 4, 7, 16])
def test_sizes_are_divided_as_lycoris_does(size: int, bound: int) -> None:
    assert factorization(size, bound) == their_factorization(size, bound)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.01])
def test_oft(kind: str, rescale: bool, alpha: float | None) -> None:
    layer = LAYERS[kind]()
    adapter = random(layer, OFT(4, alpha, rescale=rescale).fresh(layer))
    bound = (alpha or 0.0) * layer.weight.shape[0]
    theirs = diag_oft.diff_weight(
        layer.weight, adapter.tensors["blocks"], adapter.tensors.get("rescale"), constraint=bound, backend="torch"
    )
    torch.testing.assert_close(OFT.delta(adapter, layer), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rescale", [False, True])
def test_boft(kind: str, rescale: bool) -> None:
    layer = LAYERS[kind]()
    adapter = random(layer, OFT(6, rescale=rescale, stages=9).fresh(layer))
    assert OFT.check(adapter, layer) is None
    made, _ = boft.weight_gen(layer.weight, 6)
    assert adapter.tensors["blocks"].shape == made.shape
    theirs = boft.diff_weight(layer.weight, adapter.tensors["blocks"], adapter.tensors.get("rescale"), backend="torch")
    torch.testing.assert_close(OFT.delta(adapter, layer), theirs, rtol=1e-3, atol=1e-3)
    x = torch.randn(2, *((5, 16) if kind == "linear" else (8, 6, 6)))
    base = layer(x)
    place(layer, Slot(layer, [OFT.part("a", adapter, layer)]))
    changed = layer(x)
    take_off(layer)
    layer.weight.data += OFT.delta(adapter, layer)
    torch.testing.assert_close(changed, layer(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, base)


@pytest.mark.parametrize("kind", LAYERS)
def test_glora_of_today_and_of_2023(kind: str) -> None:
    layer = LAYERS[kind]()
    glora = METHODS["glora"]
    adapter = random(layer, glora(3, 5.0).fresh(layer))  # pyright: ignore[reportCallIssue]
    a1, a2, b1, b2 = (adapter.tensors[key] for key in ("a1", "a2", "b1", "b2"))
    close(glora.delta(adapter, layer), _glora_weight(layer.weight, a1, a2, b1, b2, None, 5 / 3))
    swapped = LayerAdapter("glora", {"a1": a2, "a2": a1, "b1": b2, "b2": b1}, 5.0)
    assert glora.check(swapped, layer) is None
    assert torch.equal(in_order(swapped.tensors)["b2"], b2)
    assert torch.equal(glora.delta(swapped, layer), glora.delta(adapter, layer))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(kind: str, on_input: bool) -> None:
    layer = LAYERS[kind]()
    ia3 = METHODS["ia3"]
    adapter = ia3(on_input=on_input).fresh(layer)  # pyright: ignore[reportCallIssue]
    adapter.tensors["weight"].normal_()
    close(ia3.delta(adapter, layer), _ia3_weight(layer.weight, adapter.tensors["weight"], on_input, 1.0, True))


def test_locon() -> None:
    layer = LAYERS["conv"]()
    method = METHODS["locon"]
    adapter = random(layer, method(3, 5.0).fresh(layer))  # pyright: ignore[reportCallIssue]
    down, mid, up = (adapter.tensors[key] for key in ("down", "mid", "up"))
    close(method.delta(adapter, layer), locon.diff_weight(down, up, mid, gamma=5 / 3))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("name", ["dora", "loha", "lokr"])
def test_a_magnitude_is_lycoris_weight_decomposition(kind: str, by_input: bool, name: str) -> None:
    layer = LAYERS[kind]().requires_grad_(False)
    shape = weight_shape(layer)
    method = METHODS[name]
    adapter = random(layer, DoRA(3, 5.0, by_input=by_input).fresh(layer))
    plain = LayerAdapter("lora", {key: adapter.tensors[key] for key in ("down", "up")}, 5.0)
    if name != "dora":
        plain = random(layer, method(3, 5.0).fresh(layer))  # pyright: ignore[reportCallIssue]
        adapter = LayerAdapter(name, {**plain.tensors, "magnitude": adapter.tensors["magnitude"]}, 5.0)
    assert method.check(adapter, layer) is None
    magnitude = adapter.tensors["magnitude"]
    theirs_magnitude = magnitude if by_input else magnitude.reshape(-1, *(1 for _ in shape[1:]))
    changed = layer.weight + METHODS[plain.method].delta(plain, layer)
    theirs = weight_decompose(changed, theirs_magnitude, wd_on_out=not by_input, backend="torch") - layer.weight
    close(method.delta(adapter, layer), theirs)
    x = torch.randn(2, *((5, 16) if kind == "linear" else (8, 6, 6)))
    place(layer, Slot(layer, [method.part("a", adapter, layer)], trainable=True))
    slotted = layer(x)
    take_off(layer)
    layer.weight.data += theirs
    torch.testing.assert_close(slotted, layer(x), rtol=1e-4, atol=1e-4)


def peft_dora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_has_pefts_output_and_gradients(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]())
    x = torch.randn(2, *((5, 16) if kind == "linear" else (8, 6, 6)))
    peer = peft_dora(nn.Sequential(model[0]))
    wrapped = peer.base_model.model[0]
    vector = wrapped.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        vector.mul_(1 + 0.3 * torch.rand_like(vector))
    theirs = {
        "down": wrapped.lora_A["default"].weight,
        "up": wrapped.lora_B["default"].weight,
        "magnitude": vector,
    }
    expected = peer(x)
    expected.square().sum().backward()
    layer = LayerAdapter("dora", {key: t.detach().clone() for key, t in theirs.items()}, 6.0)
    layer.tensors["magnitude"].squeeze_()  # type: ignore[attr-defined]
    assert DoRA.check(layer, wrapped.base_layer) is None
    slot = Slot(wrapped.base_layer, [DoRA.part("a", layer, wrapped.base_layer)], trainable=True)
    place(wrapped.base_layer, slot)
    ours = wrapped.base_layer(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    held = dict(slot.named_parameters())
    for key, parameter in theirs.items():
        mine = held[f"branches.0.held.{key}"].grad
        assert mine is not None
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad.reshape(mine.shape), rtol=1e-3, atol=1e-3)


def test_dora_over_nf4_never_rebuilds_the_weight_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model, "nf4", compute_dtype=torch.float32)
    attachment = attach(model, DoRA(4), "*")
    x = torch.randn(3, 64)
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the dense weight was rebuilt")

    monkeypatch.setattr("lora_diffusion.methods.dora.dequantize", refuse)
    monkeypatch.setattr("lora_diffusion.methods.deltas.dequantize", refuse)
    assert [step() for _ in range(20)][-1] < first
