"""Optimisers by name: they lower a loss, their states survive a checkpoint to the bit, their bytes are known."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion import ConfigError, TrainConfig, train
from lora_diffusion.training import optimizers
from lora_diffusion.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from lora_diffusion.training.optimizers import optimizer_bytes, optimizer_for, restore, state_of
from lora_diffusion.training.results import Progress
from lora_diffusion.training.sections import LoopConfig
from tests.training.pictures import settings

NAMES = ("adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "adafactor")


@pytest.fixture(autouse=True)
def _paged_memory_is_plain_on_a_cpu() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def made(name: str) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(80, 100))
    settings = LoopConfig(optimizer=name, lr=1e-2)  # type: ignore[arg-type]
    return parameter, optimizer_for(settings, [{"params": [parameter], "lr": 1e-2, "ratio": 1.0}])


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, target: Tensor) -> float:
    loss = (parameter - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_states_survive_a_checkpoint_to_the_bit(tmp_path: Path, name: str) -> None:
    target = torch.zeros(80, 100)
    parameter, optimizer = made(name)
    losses = [step(parameter, optimizer, target) for _ in range(5)]
    assert losses[-1] < losses[0]
    saved = Checkpoint(5, {"p": parameter.detach()}, state_of(optimizer), {}, losses)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    other, resumed = made(name)
    other.data.copy_(loaded.parameters["p"])
    restore(resumed, loaded.optimizer)
    for _ in range(2):
        assert step(parameter, optimizer, target) == step(other, resumed, target)
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_it_holds_are_known(name: str) -> None:
    parameter, optimizer = made(name)
    step(parameter, optimizer, torch.zeros(80, 100))
    (state,) = optimizer.state.values()
    tables = ("qmap1", "qmap2")  # one for all parameters
    held = sum(v.nbytes for k, v in state.items() if isinstance(v, Tensor) and v.dim() and k not in tables)
    assert optimizer_bytes(name, [parameter]) == held


def test_without_its_package_an_optimiser_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ConfigError("no")

    monkeypatch.setattr(optimizers, "bitsandbytes", missing)
    with pytest.raises(ConfigError, match=r"train\.optimizer = 'adamw8bit' needs bitsandbytes"):
        made("adamw8bit")


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor"])
def test_interrupted_it_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    whole = settings(tmp_path, steps=4, optimizer=name)
    expected = train(TrainConfig.parse(whole)).adapter
    broken = TrainConfig.parse(whole | {"output": str(tmp_path / "broken")})

    def interrupt(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(broken, interrupt).interrupted
    finished = train(broken).adapter
    assert finished is not None
    assert expected is not None
    assert finished.read_bytes() == expected.read_bytes()
