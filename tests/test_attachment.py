"""Trainable slots: fresh ones change nothing, training moves them and not the backbone."""

from __future__ import annotations

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from lora_diffusion import AdapterMismatchError, AdapterStack, LayerAdapter, LoRA, attach
from lora_diffusion.quantize import fingerprint, quantize


def inputs() -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4", "int8"])
def test_training_lowers_the_loss_and_moves_no_backbone_byte(sd: DiffusionPipeline, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    quantize(sd.unet, precision, compute_dtype=dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    before, tree = fingerprint(sd.unet), str(sd.unet)
    untouched = sd.unet(**given).sample
    attachment = attach(sd.unet, LoRA(4, 8.0), "attention+ff+conv")
    assert torch.equal(sd.unet(**given).sample, untouched)  # up starts at zero
    target = torch.randn_like(untouched)
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (sd.unet(**given).sample - target).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 for p in attachment.parameters())
    attachment.detach()
    assert fingerprint(sd.unet) == before
    assert str(sd.unet) == tree
    assert torch.equal(sd.unet(**given).sample, untouched)


def test_a_trained_adapter_stacks_to_the_same_output(sd: DiffusionPipeline) -> None:
    given = inputs()
    with attach(sd.unet, LoRA(3, 5.0), "attention+conv") as attachment:
        for parameter in attachment.parameters():
            parameter.data.normal_(std=0.1)
        with torch.no_grad():
            expected = sd.unet(**given).sample
        adapter = attachment.adapter("mine")
    with AdapterStack(sd) as stack, torch.no_grad():
        stack.add(adapter)
        torch.testing.assert_close(sd.unet(**given).sample, expected, rtol=1e-4, atol=1e-5)


def test_load_copies_an_adapter_and_refuses_another_layout(sd: DiffusionPipeline) -> None:
    with attach(sd.unet, LoRA(3), "attention+conv") as attachment:
        for parameter in attachment.parameters():
            parameter.data.normal_()
        adapter = attachment.adapter("mine")
    with attach(sd.unet, LoRA(3), "attention+conv") as again:
        again.load(adapter)
        assert again.adapter("mine") == adapter
    with attach(sd.unet, LoRA(3), "attention") as other, pytest.raises(AdapterMismatchError, match="mine"):
        other.load(adapter)


def test_requires_grad_flags_come_back(sd: DiffusionPipeline) -> None:
    sd.unet.conv_in.requires_grad_(True)
    with attach(sd.unet, LoRA(2)):
        assert not sd.unet.conv_in.weight.requires_grad
    assert sd.unet.conv_in.weight.requires_grad
    assert not sd.unet.conv_out.weight.requires_grad


def test_weight_zero_makes_the_model_its_own_teacher(sd: DiffusionPipeline) -> None:
    given = inputs()
    with torch.no_grad():
        base = sd.unet(**given).sample
    with attach(sd.unet, LoRA(2)) as attachment, torch.no_grad():
        for parameter in attachment.parameters():
            parameter.data.normal_()
        attachment.weigh(0.0)
        assert torch.equal(sd.unet(**given).sample, base)


def test_fresh_tensors_are_trained_where_they_are_and_given_ones_stay_as_they_were(sd: DiffusionPipeline) -> None:
    with attach(sd.unet, LoRA(3), "attention") as own:
        drawn = [slot.down.detach().clone() for slot in own.slots.values()]
        given = own.adapter("mine").layers["unet"]
    untouched = {name: layer.copy() for name, layer in given.items()}
    with attach(sd.unet, LoRA(3), "attention", fresh=given) as attachment:
        assert all(torch.equal(slot.down, down) for slot, down in zip(attachment.slots.values(), drawn, strict=True))
        for parameter in attachment.parameters():
            parameter.data.add_(1.0)
        assert given == untouched
        assert attachment.adapter("after").layers["unet"] != untouched


class _Drawing(LoRA):
    """Notes what it drew."""

    drawn: ClassVar[list[LayerAdapter]] = []

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        self.drawn.append(super().fresh(layer, generator))
        return self.drawn[-1]


def test_an_attachment_holds_its_numbers_once(sd: DiffusionPipeline) -> None:
    with attach(sd.unet, _Drawing(3), "attention") as attachment:
        addresses = {(slot.down.data_ptr(), slot.up.data_ptr()) for slot in attachment.slots.values()}
        assert addresses == {tuple(one.tensors[key].data_ptr() for key in ("down", "up")) for one in _Drawing.drawn}
        alive = [weakref.ref(tensor) for one in _Drawing.drawn for tensor in one.tensors.values()]
        _Drawing.drawn.clear()
        gc.collect()
        assert not any(ref() is not None for ref in alive)
