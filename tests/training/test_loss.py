"""Losses and times agree with Diffusers' own training code, and change what is trained."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    PNDMScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from lora_diffusion import TrainConfig, train
from lora_diffusion.errors import ConfigError
from lora_diffusion.families.flux import FLUX
from lora_diffusion.families.flux2 import FLUX2
from lora_diffusion.families.sd import SD
from lora_diffusion.training.batches import generator_for
from lora_diffusion.training.config import override
from lora_diffusion.training.loss import Loss, loss_for, min_snr
from lora_diffusion.training.objective import Flow, objective_for, with_zero_snr
from lora_diffusion.training.sections import LossConfig, TimesConfig
from tests.training.pictures import settings
from tests.training.test_priors import run_of


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_diffusers_scripts(target: str, gamma: float) -> None:
    scheduler, times = DDPMScheduler(prediction_type=target), torch.arange(1000)
    snr = compute_snr(scheduler, times)
    capped = torch.stack([snr, torch.full_like(snr, gamma)]).min(0).values
    wanted = capped / (snr if target == "epsilon" else snr + 1)
    torch.testing.assert_close(min_snr(scheduler.alphas_cumprod, target, gamma), wanted, rtol=1e-4, atol=1e-6)


def test_min_snr_is_finite_where_nothing_of_the_picture_is_left() -> None:
    alphas = DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing").alphas_cumprod
    assert alphas[-1] == 0
    assert min_snr(alphas, "epsilon", 5.0)[-1] == 1
    assert min_snr(alphas, "v_prediction", 5.0)[-1] == 0


def test_each_picture_is_weighted_by_its_own_timestep() -> None:
    objective = objective_for(SD, DDPMScheduler())
    loss = loss_for(LossConfig(snr_gamma=5.0), objective.schedule)
    assert loss.weights is not None
    answer, target, times = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 400, 999])
    wanted = (answer - target).square() * loss.weights[times].view(3, 1, 1, 1)
    assert torch.equal(loss.errors(answer, target, times), wanted)
    assert loss.weights[0] < 0.01
    assert loss.weights[999] == 1


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_zero_terminal_snr_is_that_of_diffusers(kind: Any) -> None:
    """The betas that Diffusers' own function rescales; drawing begins at the last timestep."""
    scheduler = kind(beta_schedule="scaled_linear", prediction_type="v_prediction")
    objective = objective_for(SD, scheduler, TimesConfig(zero_snr=True))
    alphas, target = objective.schedule or (torch.tensor([]), "")
    wanted = torch.cumprod(1 - rescale_zero_terminal_snr(scheduler.betas), 0)
    torch.testing.assert_close(alphas, wanted, rtol=1e-5, atol=1e-7)
    assert (alphas[-1], target) == (0, "v_prediction")
    assert objective_for(SD, scheduler).schedule[0][-1] > 0  # type: ignore[index]
    drawing = with_zero_snr(SD, scheduler)
    drawing.set_timesteps(5)
    assert drawing.timesteps[0] == 999
    latents, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    noisy, velocity = objective.noised(latents, noise, torch.tensor([999]))
    assert torch.equal(noisy, noise)
    assert torch.equal(velocity, -latents)


def test_noise_offset_is_that_of_diffusers_scripts(tmp_path: Path) -> None:
    """noise + offset · (one number a picture and channel); what is measured has none."""
    drawn = []
    for offset in (0.0, 0.3):
        run = run_of(TrainConfig.parse(settings(tmp_path) | {"loss": {"noise_offset": offset}}))
        batch = run.data.draw(0)
        drawn.append(run.judge._draw("noise", batch, 0)[0])
    added = (drawn[1] - drawn[0]) / 0.3
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), atol=1e-5, rtol=1e-5)
    generator = generator_for(0, "noise", 0)
    torch.randn(drawn[0].shape, generator=generator)
    torch.testing.assert_close(added[..., 0, 0], torch.randn(added.shape[:2], generator=generator), atol=1e-5, rtol=0)


def test_huber_and_smooth_l1_are_square_inside_and_linear_outside() -> None:
    error, times = torch.tensor([[0.0, 0.05, -0.1, 1.0, -3.0]]), torch.zeros(1, dtype=torch.long)
    wanted = torch.where(error.abs() < 0.1, error.square() / 2, 0.1 * (error.abs() - 0.05))
    zeros = torch.zeros_like(error)
    torch.testing.assert_close(Loss("huber", 0.1).errors(error, zeros, times), wanted)
    torch.testing.assert_close(Loss("smooth_l1", 0.1).errors(error, zeros, times), wanted / 0.1)


@pytest.mark.parametrize(("sampling", "theirs"), [("logit-normal", "logit_normal"), ("uniform", "none")])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_times_are_those_of_diffusers(sampling: Any, theirs: str, mean: float, std: float) -> None:
    if sampling == "uniform" and mean:
        pytest.skip("uniform has no mean")
    times = TimesConfig(sampling=sampling, mean=mean, std=std, shift=1.0)
    ours = Flow(3.0, times).draw(64, torch.Generator().manual_seed(4))
    peer = compute_density_for_timestep_sampling(
        theirs, 64, logit_mean=mean, logit_std=std, generator=torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(ours, peer)


def test_a_shift_of_its_own_replaces_the_schedulers_in_training_and_not_in_measuring() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    base, shifted = (objective_for(FLUX, scheduler, TimesConfig(shift=shift)) for shift in (None, 6.0))
    plain = objective_for(FLUX, scheduler, TimesConfig(shift=1.0)).draw(9, torch.Generator().manual_seed(0))
    for objective, shift in ((base, 3.0), (shifted, 6.0)):
        peer = FlowMatchEulerDiscreteScheduler(shift=shift)
        peer.set_timesteps(sigmas=plain.tolist())
        torch.testing.assert_close(objective.draw(9, torch.Generator().manual_seed(0)), peer.sigmas[:-1])
    assert torch.equal(base.grid(8), shifted.grid(8))


@pytest.mark.parametrize("side", [8, 64, 128])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_size_is_the_schedulers_own(side: int, kind: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    objective = objective_for(FLUX, scheduler, TimesConfig(dynamic=True))
    plain = objective_for(FLUX, scheduler, TimesConfig(shift=1.0)).draw(9, torch.Generator().manual_seed(0))
    scheduler.set_timesteps(sigmas=plain.tolist(), mu=calculate_shift((side // 2) ** 2))
    torch.testing.assert_close(objective.draw(9, torch.Generator().manual_seed(0), (side, side)), scheduler.sigmas[:-1])


@pytest.mark.parametrize("size", [(8, 16), (64, 64), (80, 64)])
def test_flux_2_is_shifted_as_its_pipeline_does(size: tuple[int, int]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    objective = objective_for(FLUX2, scheduler, TimesConfig(dynamic=True))
    plain = objective_for(FLUX2, scheduler, TimesConfig(shift=1.0)).draw(9, torch.Generator().manual_seed(0))
    steps = signature(Flux2KleinPipeline.__call__).parameters["num_inference_steps"].default
    scheduler.set_timesteps(sigmas=plain.tolist(), mu=compute_empirical_mu(size[0] * size[1], steps))
    torch.testing.assert_close(objective.draw(9, torch.Generator().manual_seed(0), size), scheduler.sigmas[:-1])


def test_a_shift_by_size_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no shift by size"):
        objective_for(FLUX, FlowMatchEulerDiscreteScheduler(), TimesConfig(dynamic=True))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="two shifts"):
        objective_for(FLUX, scheduler, TimesConfig(dynamic=True, shift=3.0))


@pytest.mark.parametrize(
    ("base", "changes", "match"),
    [
        ("flux", ("loss.snr_gamma=5.0",), r"loss\.snr_gamma = 5\.0 is for bases that predict epsilon or v"),
        ("sd", ("times.shift=3.0",), r"\[times\] but for emphasis is for flows, and family 'sd'"),
        ("flux", ("loss.noise_offset=0.1",), r"loss\.noise_offset is for epsilon and v"),
        ("flux", ("times.zero_snr=true",), r"times\.zero_snr is for bases that predict v"),
        ("sd", ("times.zero_snr=true",), r"times\.zero_snr is for bases that predict v"),
        ("flux", ("times.sampling=uniform", "times.mean=1.0"), r"times\.mean and times\.std are of 'logit-normal'"),
    ],
)
def test_options_of_another_process_are_refused(
    tmp_path: Path, base: str, changes: tuple[str, ...], match: str
) -> None:
    given = settings(tmp_path, base)
    for change in changes:
        override(given, change)
    with pytest.raises(ConfigError, match=match):
        train(TrainConfig.parse(given))
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("sd", "loss.snr_gamma=1.0"),
        ("sd", "loss.kind=smooth_l1"),
        ("sd", "loss.noise_offset=0.1"),
        ("sd", "train.batch=1"),
        ("flux", "times.sampling=uniform"),
    ],
)
def test_an_option_changes_the_training_and_not_what_is_measured(tmp_path: Path, base: str, change: str) -> None:
    given = settings(tmp_path, base, steps=2)
    plain = train(TrainConfig.parse(given))
    override(given, change)
    changed = train(TrainConfig.parse(given | {"output": str(tmp_path / "other")}))
    assert changed.losses != plain.losses
    assert changed.heldout_base == pytest.approx(plain.heldout_base, rel=1e-6)  # a batch rounds in its own way
    assert changed.heldout_adapter != plain.heldout_adapter
