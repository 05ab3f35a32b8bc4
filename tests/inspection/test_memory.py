"""The memory plan against what a real step allocates, and its advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lora_diffusion import ConfigError, LoRA, TrainConfig, attach
from lora_diffusion.families import family_of
from lora_diffusion.families.sd import SD
from lora_diffusion.inspection.memory import CAPTION, Cost, encoding_with, plan_memory, ways_to_fit
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.quantize import weight_bytes
from lora_diffusion.training.judging import keeping_less
from lora_diffusion.training.loop import turn_on_checkpointing
from lora_diffusion.training.objective import losses, objective_for
from tests.cli.test_cli import run, toml
from tests.families.test_training import PIPELINES
from tests.training.pictures import settings


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Training of a tiny base on pictures large enough for activations to count."""
    made = settings(tmp_path_factory.mktemp("run"))
    made["data"]["resolution"] = 64
    return TrainConfig.parse(made)


@pytest.mark.parametrize(
    ("saving", "passes"), [("nothing", 1), ("train.checkpointing", 1), ("nothing", 2), ("train.recompute", 1)]
)
def test_the_planned_peak_is_the_measured_one_within_ten_percent(given: TrainConfig, saving: str, passes: int) -> None:
    given = given.changed("train.recompute=false", f"train.accumulate={passes}")
    given = given if saving == "nothing" else given.changed(f"{saving}=true")
    planned = plan_memory(given, gpu=False).this_run
    opened = load_pipeline(given.base, precision="nf4", device="cpu")
    unet = opened.pipe.unet
    assert planned.weights == weight_bytes(unet)
    attachment = attach(unet, LoRA(4), "attention+ff")
    assert planned.trained == sum(p.numel() for p in attachment.parameters())
    assert planned.optimizer == 2 * planned.adapter == 2 * sum(p.nbytes for p in attachment.parameters())
    for slot in attachment.slots.values():
        slot.train()
    if given.train.checkpointing:
        turn_on_checkpointing(unet)
    measured = _allocated_by_a_step(unet, objective_for(SD, opened.pipe.scheduler), passes, given)
    assert planned.gradients + planned.activations == pytest.approx(measured, rel=0.1)


def _allocated_by_a_step(unet: torch.nn.Module, objective: object, passes: int, given: TrainConfig) -> int:
    latents, states = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 32)

    def step() -> None:
        noise, times = torch.randn(2, 4, 32, 32), torch.tensor([10, 500])
        with keeping_less(given.train):
            loss = losses(SD, objective, unet, latents, {"states": states}, noise, times).mean()  # type: ignore[arg-type]
        loss.backward()

    return _allocated(step, unet, passes)


def _allocated(step: Callable[[], None], denoiser: torch.nn.Module, passes: int = 1) -> int:
    """Most bytes that torch's allocator has handed out at once during forward and backward."""
    step()  # compiles what is compiled once
    for parameter in denoiser.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(passes):
            step()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_full_training_holds_four_numbers_a_weight_and_the_adapter_a_fraction(given: TrainConfig) -> None:
    full, plain, packed = plan_memory(given, gpu=True).columns
    assert (full.weights, full.gradients, full.optimizer) == (full.weights, full.weights, 2 * full.weights)
    assert full.adapter == 0
    assert plain.trained == packed.trained < full.trained / 10
    assert packed.weights < plain.weights == full.weights
    assert packed.peak < plain.peak < full.peak


def test_advice_is_given_in_order_and_only_where_it_is_needed(given: TrainConfig) -> None:
    dense = given.changed("backbone.precision=bf16", "train.recompute=false")
    assert ways_to_fit(dense, 1e12, gpu=True) == []
    steps = ways_to_fit(dense, 1.0, gpu=True)
    named = [setting for setting, _ in steps]
    assert named[:2] == ["train.recompute=true", "train.checkpointing=true"]
    assert any(setting.startswith("train.batch=1 train.accumulate=2") for setting in named)
    peaks = [cost.peak for _, cost in steps]
    assert peaks == sorted(peaks, reverse=True)
    enough = peaks[0]
    assert [cost.peak for _, cost in ways_to_fit(dense, enough, gpu=True)] == [enough]


def test_the_command_shows_three_ways_and_what_to_turn_on(
    given: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = toml(tmp_path / "run.toml", given.model_dump(mode="json", exclude_none=True))
    assert run(monkeypatch, "plan", file, "--gpu", "0.601") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("full", "LoRA", "QLoRA (this run)", "activations", "training does not fit"))
    assert "train.checkpointing=true" in shown
    assert "encoding does not fit" in shown
    assert "backbone.text_encoders=nf4  ->" in shown
    assert "convolution:" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_base_that_is_not_there_is_one_sentence(given: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"model_index\.json is missing"):
        plan_memory(given.changed("base=./nowhere"))


def test_new_tokens_count_beside_layers_and_without_any(given: TrainConfig) -> None:
    tokens = ('text.tokens={"<kiki>" = "cat"}', "text.token_vectors=3", "data.trigger=<kiki>")
    plain, beside, alone = (
        plan_memory(given.changed(*more), gpu=False).this_run for more in ((), tokens, (*tokens, "adapter.targets=[]"))
    )
    width = load_pipeline(given.base, precision="fp32", device="cpu").pipe.text_encoder.config.hidden_size
    assert alone.trained == 3 * width
    assert beside.trained == plain.trained + 3 * width
    assert 0 < alone.activations <= beside.activations


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_can_be_planned_and_its_own_layers_count_as_they_are_kept(name: str, tmp_path: Path) -> None:
    """The weights of the plan are those of the base as training opens it."""
    PIPELINES[name]().save_pretrained(tmp_path / "base")
    made = settings(tmp_path, batch=1)
    for changes in ({}, {"keep_adaln": True}):
        config = TrainConfig.parse(made | {"backbone": {"device": "cpu", **changes}})
        planned = plan_memory(config, gpu=False)
        opened = load_pipeline(tmp_path / "base", precision="nf4", device="cpu", **changes)  # type: ignore[arg-type]
        assert planned.this_run.weights == weight_bytes(getattr(opened.pipe, family_of(opened.pipe).denoiser))
        assert planned.report is not None
        assert opened.report is not None
        assert planned.report.groups() == opened.report.groups()
        assert planned.this_run.peak < planned.columns[0].peak
        assert planned.encoding > planned.waiting
    assert any(group[1].startswith("timestep modulation") for group in planned.report.groups()) == has_adaln(name)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_planned_peak_is_the_measured_one_for_every_family(name: str, tmp_path: Path) -> None:
    """Within ten percent, masks of joint attention and the gradients that are added up on the way included."""
    PIPELINES[name]().save_pretrained(tmp_path / "base")
    side = 64 if name.startswith(("sd ", "sd3")) else 128  # SD3's table of places ends there
    made = settings(tmp_path, batch=2)
    made["data"]["resolution"] = side
    config = TrainConfig.parse(made)
    pipe = load_pipeline(config.base, precision="nf4", device="cpu").pipe
    family, objective = family_of(pipe), objective_for(family_of(pipe), pipe.scheduler)
    denoiser = getattr(pipe, family.denoiser)
    with torch.no_grad():
        conditioning = family.encode_prompts(pipe, [CAPTION] * 2)
        conditioning |= {"time_ids": torch.zeros(2, 6)} if family.sized else {}
        latents = family.encode_pictures(pipe, torch.rand(2, 3, side, side))
    times = objective.draw(2, torch.Generator().manual_seed(0))
    attachment = attach(denoiser, LoRA(config.adapter.rank), config.adapter.targets, component=family.denoiser)
    for slot in attachment.slots.values():
        slot.train()

    def step() -> None:
        noise = torch.randn_like(latents)
        losses(family, objective, denoiser, latents, conditioning, noise, times).mean().backward()

    plain = plan_memory(config, gpu=False).this_run
    assert plain.gradients + plain.activations == pytest.approx(_allocated(step, denoiser), rel=0.1)
    turn_on_checkpointing(denoiser)
    saving = plan_memory(config.changed("train.checkpointing=true"), gpu=False).this_run
    assert saving.gradients + saving.activations == pytest.approx(_allocated(step, denoiser), rel=0.1)


def has_adaln(name: str) -> bool:
    """Families without layers of that kind: modulation is a table, or one of the family's own kept layers."""
    return not name.startswith(("sana", "pixart", "chroma", "flux2"))


def test_text_encoders_count_when_they_are_trained_and_less_when_they_are_quantised(given: TrainConfig) -> None:
    plain, trained = (plan_memory(given.changed(*more), gpu=False) for more in ((), ('text.train=["text_encoder"]',)))
    encoder = load_pipeline(given.base, precision="fp32", device="cpu").pipe.text_encoder
    assert trained.this_run.weights - plain.this_run.weights == weight_bytes(encoder)
    with attach(encoder, LoRA(4), "attention") as attachment:
        more = sum(p.numel() for p in attachment.parameters())
    assert trained.this_run.trained - plain.this_run.trained == more
    assert trained.this_run.activations > plain.this_run.activations
    assert trained.columns[0] == plain.columns[0]
    packed = plan_memory(given.changed("backbone.text_encoders=nf4"), gpu=False)
    assert packed.encoding < plain.encoding
    assert encoding_with(given.changed("backbone.text_encoders=nf4"), plain.waiting, gpu=False) == packed.encoding
    assert trained.waiting == plain.waiting
    assert trained.encoding == plain.encoding
    cheap = plan_memory(given.changed("train.optimizer=adafactor", "train.ema=0.9"), gpu=False).this_run
    assert cheap.optimizer < plain.this_run.optimizer / 2
    assert cheap.average == cheap.adapter
    token = given.changed('text.tokens={"<kiki>" = "cat"}', "text.token_vectors=3")
    learned = plan_memory(token, gpu=False).this_run
    width = encoder.get_input_embeddings().weight.shape[1]
    assert learned.trained - plain.this_run.trained == 3 * width
    assert learned.weights == trained.this_run.weights
    assert learned.activations > plain.this_run.activations


def test_a_teacher_s_loss_comes_when_there_are_gradients_already(given: TrainConfig) -> None:
    taught = given.changed("data.trigger=sks", "prior.kind=teacher", "prior.subject=dog")
    once, twice = (plan_memory(config, gpu=False).this_run for config in (given, taught))
    assert once.activations < twice.activations <= once.activations + once.gradients


def test_a_cost_adds_up() -> None:
    assert Cost("x", 1, 2, 3, 4, 5, 6, 7).peak == 27
