"""Methods that PEFT has too, beside those with files of their own: the same tensors, rates and starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import EvaConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.attachment import attach
from lora_diffusion.beginning import eva_start, loftq_start
from lora_diffusion.lora import Slot, place, take_off
from lora_diffusion.methods import METHODS
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.quantize import dequantize, quantize

INPUTS = {"to_q": (3, 5, 12), "conv": (2, 4, 6, 6)}


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"to_q": nn.Linear(12, 10, bias=False), "conv": nn.Conv2d(4, 6, 3, bias=False)})


def peer(config: Any) -> Any:
    """PEFT's layers over the same weights, filled with random numbers."""
    wrapped = get_peft_model(model(), config)
    for parameter in (p for p in wrapped.parameters() if p.requires_grad):
        parameter.data.normal_()
    return wrapped.base_model.model


def answer(name: str, method: str, tensors: dict[str, Tensor], alpha: float | None, x: Tensor) -> Tensor:
    """What our layer computes with those tensors."""
    layer = model()[name]
    adapter = LayerAdapter(method, {key: tensor.detach() for key, tensor in tensors.items()}, alpha, "tensor")
    assert METHODS[method].check(adapter, layer) is None
    place(layer, Slot(layer, [METHODS[method].part("a", adapter, layer)]))
    found: Tensor = layer(x)
    take_off(layer)
    return found


@pytest.mark.parametrize("name", INPUTS)
def test_loha(name: str) -> None:
    theirs, x = peer(LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv"]))[name], torch.randn(INPUTS[name])
    parts = ("w1_a", "w1_b", "w2_a", "w2_b")
    tensors = {part: getattr(theirs, f"hada_{part}")["default"] for part in parts}
    torch.testing.assert_close(answer(name, "loha", tensors, 5.0, x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("both", [False, True])
def test_lokr(name: str, both: bool) -> None:
    config = LoKrConfig(r=1, alpha=3, decompose_both=both, decompose_factor=2, target_modules=["to_q", "conv"])
    theirs, x = peer(config)[name], torch.randn(INPUTS[name])
    tensors: dict[str, Tensor] = {}
    for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"):
        held = getattr(theirs, f"lokr_{part}")
        tensors |= {part: held["default"]} if "default" in held else {}
    assert "w2_a" in tensors
    torch.testing.assert_close(answer(name, "lokr", tensors, 3.0, x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(name: str, on_input: bool) -> None:
    """Theirs multiplies by the number, ours by 1 and the number more; biases, which theirs scales too, are not here."""
    inner = ["to_q", "conv"] if on_input else []
    theirs = peer(IA3Config(target_modules=["to_q", "conv"], feedforward_modules=inner))[name]
    x = torch.randn(INPUTS[name])
    factor = theirs.ia3_l["default"]
    shape = (-1,) if name == "to_q" else (1, -1, 1, 1)
    tensors = {"weight": (factor - 1).reshape(shape), "on_input": torch.tensor(int(on_input))}
    torch.testing.assert_close(answer(name, "ia3", tensors, None, x), theirs(x), rtol=1e-4, atol=1e-4)


def test_lora_plus_gives_the_same_factor_the_same_rate() -> None:
    wrapped = get_peft_model(model(), LoraConfig(r=2, target_modules=["to_q", "conv"]))
    groups = create_loraplus_optimizer(wrapped, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    theirs = {
        ("up" if "lora_B" in name else "down", rates[id(p)]) for name, p in wrapped.named_parameters() if id(p) in rates
    }
    with attach(model(), LoRA(2), ["to_q", "conv"]) as attachment:
        ours = {id(p): group["lr"] for group in attachment.groups(1e-3, up_ratio=16) for p in group["params"]}
        found = {(name.rpartition(".")[2], ours[id(p)]) for name, p in attachment.named_parameters()}
    assert found == theirs == {("down", 1e-3), ("up", 16e-3)}


def test_loftq_is_their_decomposition_of_what_was_lost() -> None:
    layer = nn.Linear(64, 64, bias=False)
    weights = {"to_q.weight": layer.weight.detach().clone()}
    packed = nn.ModuleDict({"to_q": layer})
    quantize(packed, "nf4", compute_dtype=torch.float32)
    start = loftq_start(packed, {"to_q": LoRA(8)}, weights)["to_q"]
    theirs = _low_rank_decomposition(weights["to_q.weight"] - dequantize(packed["to_q"]), reduced_rank=8)
    found = start.tensors["up"] @ start.tensors["down"]
    torch.testing.assert_close(found, theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-5)


def test_eva_has_their_directions() -> None:
    seen = torch.randn(64, 12) * torch.linspace(3, 0.1, 12)
    seen = seen - seen.mean(0)  # theirs takes the mean off
    layer = model()["to_q"]
    start = eva_start({"to_q": layer}, {"to_q": LoRA(3)}, lambda: layer(seen))["to_q"]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = model()["to_q"]

        def forward(self, x: Tensor) -> Tensor:
            return self.to_q(x)

    config = LoraConfig(r=3, target_modules=["to_q"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=0.999))
    wrapped = get_peft_model(Called(), config)
    initialize_lora_eva_weights(
        wrapped,
        [{"x": seen}] * 8,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, given, name: inputs[0],
        show_progress_bar=False,
    )
    theirs = wrapped.base_model.model.to_q.lora_A["default"].weight
    torch.testing.assert_close((start.tensors["down"] @ theirs.t()).abs(), torch.eye(3), rtol=0, atol=1e-4)
