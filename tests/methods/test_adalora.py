"""AdaLoRA against PEFT's: the layer, the penalty and every decision of its allocator on the same tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_diffusion import AdapterStack, TrainConfig, load_adapter, train
from lora_diffusion.attachment import attach
from lora_diffusion.errors import AdapterFileError, AdapterMismatchError, ConfigError
from lora_diffusion.lora import Slot, place
from lora_diffusion.methods import METHODS
from lora_diffusion.methods.adalora import AdaLoRA
from lora_diffusion.methods.allocating import Allocator, Schedule
from tests import tiny
from tests.training.pictures import cut_off, settings

NAMES = {"down": "lora_A", "sigma": "lora_E", "up": "lora_B"}
STEPS = 12


class Answer:
    """What PEFT's AdaLoRA adds its penalty to."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Net(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.to_q, self.to_k = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_k(self.to_q(self.conv(x).flatten(2).mean(2)).tanh())


class Measured(Net):
    """The same, answering with a loss."""

    def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
        return Answer(super().forward(x).sub(1).square().mean())


METHOD = AdaLoRA(6, 9.0, final_rank=2, hold=2, settle=3, every=2, orthogonality=0.3)
X = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(2))


def peer() -> nn.Module:
    config = AdaLoraConfig(
        init_r=6, lora_alpha=9, target_r=2, tinit=2, tfinal=3, deltaT=2, orth_reg_weight=0.3, total_step=STEPS,
        target_modules=["conv", "to_q", "to_k"],
    )  # fmt: skip
    return get_peft_model(Measured(), config)


def parts(theirs: nn.Module, layer: str) -> dict[str, nn.Parameter]:
    wrapped = getattr(theirs.base_model.model, layer)  # type: ignore[union-attr]
    return {key: getattr(wrapped, name)["default"] for key, name in NAMES.items()}


def test_a_run_is_pefts_step_by_step() -> None:
    """Outputs, penalty, which ranks go and when: the values, zeros included, after every step."""
    theirs, ours = peer(), Net()
    with attach(ours, METHOD, ["conv", "to_q", "to_k"]) as attachment:
        for name, parameter in attachment.named_parameters():
            layer, key = name.rsplit(".", 1)
            parameter.data.copy_(parts(theirs, layer)[key].detach().reshape(parameter.shape))
        attachment.begin(METHOD, STEPS)
        course = attachment.course
        assert isinstance(course, Allocator)
        mine = torch.optim.SGD(attachment.parameters(), lr=0.5)
        other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
        left = list[int]()
        for step in range(1, STEPS + 1):
            mine.zero_grad(), other.zero_grad()
            loss = (ours(X) - 1).square().mean() + course.penalty()
            expected = theirs.base_model(X).loss
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
            loss.backward(), expected.backward()
            mine.step(), other.step()
            course.after(step)
            theirs.base_model.update_and_allocate(step)  # type: ignore[operator]
            for name, parameter in attachment.named_parameters():
                layer, key = name.rsplit(".", 1)
                found, wanted = parameter.detach(), parts(theirs, layer)[key].detach().reshape(parameter.shape)
                torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4)
                if key == "sigma":
                    assert torch.equal(found == 0, wanted == 0)
            left.append(sum(int((layer.sigma != 0).sum()) for layer in course.layers.values()))
        assert left[:3] == [18, 18, 18]
        assert 6 < left[3] < 18
        assert left[8:] == [6, 6, 6, 6]
        answer, adapter = ours(X).detach(), attachment.adapter("a")
    ranks = {name: len(layer.tensors["down"]) for name, layer in adapter.layers["unet"].items()}
    assert sum(ranks.values()) == 6
    assert adapter.methods == {"lora"}
    with attach(ours, METHOD, ["conv", "to_q", "to_k"]) as again:
        again.load(adapter)
        torch.testing.assert_close(ours(X), answer, rtol=1e-5, atol=1e-5)
        assert again.adapter("a") == adapter


def test_a_layer_of_which_nothing_is_left_is_left_out_and_read_back_as_such() -> None:
    model = Net()
    with attach(model, AdaLoRA(4), ["to_q", "to_k"]) as attachment:
        assert len(attachment.adapter("fresh")) == 2  # all of a fresh one, which is no decision
        parameters = dict(attachment.named_parameters())
        parameters["to_q.sigma"].data.copy_(torch.tensor([0.0, 2.0, 0.0, -1.0]))
        answer, adapter = model(X).detach(), attachment.adapter("a")
        assert {name: len(layer.tensors["down"]) for name, layer in adapter.layers["unet"].items()} == {"to_q": 2}
        assert adapter.layers["unet"]["to_q"].alpha == 2.0
        attachment.load(adapter)
        torch.testing.assert_close(model(X), answer)
        parameters["to_k.sigma"].data.fill_(1.0)
        attachment.load(adapter)
        assert not parameters["to_k.sigma"].any()
    with attach(model, AdaLoRA(1, final_rank=1), ["to_q", "to_k"]) as narrow, pytest.raises(AdapterMismatchError):
        narrow.load(adapter)


def test_the_budget_falls_with_the_third_power() -> None:
    schedule = Schedule(steps=100, hold=10, settle=30, every=5, final=20)
    assert [schedule.budget(step, 100) for step in (1, 10, 40, 70, 71, 100)] == [100, 100, 30, 20, 20, 20]
    assert [step for step in range(1, 101) if schedule.drops(step)] == [*range(15, 70, 5), 70]


@pytest.mark.parametrize(
    ("given", "match"),
    [({"final_rank": 17}, "final_rank is 17"), ({"every": 0}, "every"), ({"beta_mean": 1.0}, "betas")],
)
def test_settings_without_sense_are_refused(given: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        AdaLoRA(16, **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave none of 5 steps"):
        AdaLoRA(4, hold=2, settle=3).course({}, 5)


def test_it_trains_from_a_configuration_resumes_exactly_and_diffusers_draws_what_is_left(tmp_path: Path) -> None:
    given = settings(tmp_path, lr=2e-2, ema=0.9)
    given["adapter"] |= {"method": "adalora", "settings": {"final_rank": 2, "hold": 1, "settle": 1}}
    config = TrainConfig.parse(given)
    whole = train(config)
    stopped = config.changed(f"output={tmp_path / 'resumed'}")
    cut_off(stopped, at=3)
    resumed = train(stopped)
    assert whole.adapter is not None
    assert resumed.adapter is not None
    adapter = load_adapter(whole.adapter)
    assert load_adapter(resumed.adapter) == adapter
    assert whole.backbone_unchanged
    assert adapter.methods == {"lora"}
    ranks = [len(layer.tensors["down"]) for *_, layer in adapter]
    assert len(set(ranks)) > 1  # mixed, two a layer on average
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain = tiny.picture(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        ours = tiny.picture(pipe)
    assert np.abs(ours - plain).max() > 1e-4
    pipe.load_lora_weights(whole.adapter)
    np.testing.assert_allclose(ours, tiny.picture(pipe), atol=1e-4)


def pefts(root: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A PEFT AdaLoRA of random numbers with a rank dropped here and all there, saved; the base and its true deltas."""
    model = Net()
    base = copy.deepcopy(model)
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, lora_alpha=6, target_modules=["to_q", "to_k", "conv"]
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    kept = {"to_q": [True, False, True, True], "to_k": [False] * 4, "conv": [True] * 4}
    config.rank_pattern = {f"{name}.lora_E": keep for name, keep in kept.items()}
    for name, keep in kept.items():
        values = wrapped.get_submodule(f"base_model.model.{name}").lora_E["default"]
        values.data[~torch.tensor(keep)] = 0.0
    deltas = {name: wrapped.get_submodule(f"base_model.model.{name}").get_delta_weight("default") for name in kept}
    wrapped.save_pretrained(root)
    return base, {name: delta.detach() for name, delta in deltas.items()}


def test_a_peft_folder_of_adalora_is_read_as_what_peft_computes(tmp_path: Path) -> None:
    base, deltas = pefts(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    (layers,) = adapter.layers.values()
    assert {name: (layer.method, len(layer.tensors["down"])) for name, layer in layers.items()} == {
        "to_q": ("lora", 3),
        "conv": ("lora", 4),
    }
    assert not deltas["to_k"].any()
    for name, layer in layers.items():
        delta = METHODS["lora"].delta(layer, base.get_submodule(name))
        torch.testing.assert_close(delta, deltas[name], rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    for name, layer in layers.items():
        live = base.get_submodule(name)
        place(live, Slot(live, [METHODS["lora"].part("a", layer, live)]))
    with torch.no_grad():
        torch.testing.assert_close(base(X), again(X), rtol=1e-4, atol=1e-4)


def test_adalora_without_its_folders_config_is_no_lora(tmp_path: Path) -> None:
    pefts(tmp_path / "theirs")
    (tmp_path / "theirs" / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match=r"lora_E.*adapter_config\.json"):
        load_adapter(tmp_path / "theirs" / "adapter_model.safetensors")
