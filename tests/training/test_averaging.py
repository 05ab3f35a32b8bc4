"""The average is Diffusers' `EMAModel`, and is saved where the configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from lora_diffusion import LoRA, TrainConfig, attach, load_adapter, train
from lora_diffusion.training.averaging import Average
from tests.training.pictures import settings


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_it_is_the_average_of_diffusers(decay: float) -> None:
    attachment = attach(nn.Sequential(nn.Linear(6, 5)), LoRA(rank=2), "all-linear")
    ours, peer = Average(attachment, decay), EMAModel(attachment.parameters(), decay=decay)
    for count in range(1, 6):
        for parameter in attachment.parameters():
            parameter.data += torch.randn_like(parameter)
        ours.update(count)
        peer.step(attachment.parameters())
    for average, theirs in zip(ours.tensors.values(), peer.shadow_params, strict=True):
        torch.testing.assert_close(average, theirs, rtol=1e-6, atol=1e-6)
    ours.put_in(None)
    assert all(torch.equal(p, ours.tensors[name]) for name, p in attachment.named_parameters())


def test_instead_and_beside_give_the_same_average_and_leave_the_training_alone(tmp_path: Path) -> None:
    made = {}
    for case, change in {"plain": {}, "instead": {"ema": 0.9}, "beside": {"ema": 0.9, "ema_saved": "beside"}}.items():
        result = train(TrainConfig.parse(settings(tmp_path, steps=3, **change) | {"output": str(tmp_path / case)}))
        assert result.adapter is not None
        made[case] = result, load_adapter(result.adapter)
    beside = load_adapter(tmp_path / "beside" / "blocks-ema.safetensors")
    assert made["plain"][1] == made["beside"][1]
    assert made["plain"][0].losses == made["instead"][0].losses
    assert made["instead"][1] == beside != made["plain"][1]
    assert made["instead"][0].heldout_adapter != made["plain"][0].heldout_adapter
    assert not (tmp_path / "instead" / "blocks-ema.safetensors").exists()
