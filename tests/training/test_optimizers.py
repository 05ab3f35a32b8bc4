"""Optimisers by name: they lower a loss, their states survive a checkpoint to the bit, their bytes are known."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion import ConfigError, TrainConfig, load_adapter, train
from lora_diffusion.training import optimizers
from lora_diffusion.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from lora_diffusion.training.optimizers import optimizer_bytes, optimizer_for, rate_of, restore, state_of
from lora_diffusion.training.sections import LoopConfig
from tests.training.pictures import interrupted, settings

NAMES = ("adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "adafactor", "prodigy", "schedule-free")


@pytest.fixture(autouse=True)
def _paged_memory_is_plain_on_a_cpu() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def made(name: str) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(80, 100))
    lr = 1.0 if name == "prodigy" else 1e-2
    settings = LoopConfig(optimizer=name, lr=lr)  # type: ignore[arg-type]
    return parameter, optimizer_for(settings, [{"params": [parameter], "lr": lr, "ratio": 1.0}])


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


@pytest.mark.parametrize(
    ("name", "lr"), [("adamw8bit", 5e-3), ("adafactor", 5e-3), ("prodigy", 1.0), ("schedule-free", 0.1)]
)
def test_interrupted_and_looked_at_it_ends_with_the_same_bytes(tmp_path: Path, name: str, lr: float) -> None:
    whole = settings(tmp_path, steps=4, optimizer=name, lr=lr)
    expected = train(TrainConfig.parse(whole)).adapter
    broken = TrainConfig.parse(whole | {"output": str(tmp_path / "broken"), "watch": {"measure_every": 1}})
    interrupted(broken)
    finished = train(broken).adapter
    assert finished is not None
    assert expected is not None
    assert finished.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("schedule-free", "schedulefree")])
def test_a_missing_extra_is_named_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    given = settings(tmp_path, optimizer=name) | {"base": "nowhere/at/all"}
    with pytest.raises(ConfigError, match=rf"needs {package}, .* 'lora-diffusion\[optimizers\]'"):
        train(TrainConfig.parse(given))


def test_prodigy_multiplies_a_rate_of_one_by_what_it_finds() -> None:
    assert LoopConfig(optimizer="prodigy").lr == 1.0
    assert LoopConfig(optimizer="prodigy", lr=0.5).lr == 0.5
    parameter, optimizer = made("prodigy")
    begun = rate_of(optimizer)
    for _ in range(30):
        step(parameter, optimizer, torch.zeros(80, 100))
    assert begun == pytest.approx(1e-6)
    assert rate_of(optimizer) > 3 * begun


def test_what_schedule_free_saves_is_its_average_and_not_what_it_trains(tmp_path: Path) -> None:
    result = train(TrainConfig.parse(settings(tmp_path, steps=4, optimizer="schedule-free", lr=0.1)))
    assert result.adapter is not None
    (folder,) = (tmp_path / "out" / "checkpoints").iterdir()
    kept = load_checkpoint(folder)
    saved = [tensor for *_, layer in load_adapter(result.adapter) for tensor in layer.tensors.values()]
    assert len(saved) == len(kept.parameters)
    for trained in kept.parameters.values():
        ends = [state["z"] for state in kept.optimizer["state"].values() if state["z"].shape == trained.shape]
        averages = [trained.lerp(z, 1 - 1 / 0.9) for z in ends]  # x of y = (1 - β) z + β x, arXiv 2405.15682, eq. 3
        assert sum(torch.equal(one, x) or torch.equal(one.T, x) for one in saved for x in averages) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train": {"optimizer": "prodigy", "up_ratio": 16}}, r"set train\.up_ratio to 1"),
        ({"train": {"optimizer": "prodigy"}, "text": {"train": ["text_encoder"]}}, r"set text\.lr to 1, as train\.lr"),
        ({"train": {"optimizer": "schedule-free", "schedule": "cosine"}}, r"instead of train\.schedule"),
        ({"train": {"optimizer": "schedule-free", "ema": 0.9}}, r"leave train\.ema out"),
    ],
)
def test_what_an_optimiser_cannot_be_told_is_said(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    given = {"name": "x", "base": "b", "output": "o", "data": {"folder": "f"}}
    with pytest.raises(ConfigError, match=match):
        TrainConfig.parse(given | change)
    if "ema" in change["train"]:  # of the recipe it is left out
        assert TrainConfig.parse(given | {"recipe": "style", "train": {"optimizer": "schedule-free"}}).train.ema is None


def test_schedule_free_does_not_go_with_a_method_that_looks_at_gradients(tmp_path: Path) -> None:
    given = settings(tmp_path, optimizer="schedule-free")
    given["adapter"]["method"] = "adalora"
    with pytest.raises(ConfigError, match="'adalora' looks at gradients after each step"):
        train(TrainConfig.parse(given))
