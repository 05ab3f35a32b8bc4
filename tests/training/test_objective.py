"""Targets agree with Diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lora_diffusion.families.flux import FLUX
from lora_diffusion.families.sd import SD
from lora_diffusion.training.objective import Flow, objective_for


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_ddpm(target: str, zero_snr: bool) -> None:
    scheduler = DDIMScheduler(prediction_type=target, rescale_betas_zero_snr=zero_snr)
    peer = DDPMScheduler.from_config(scheduler.config)
    x, noise, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 10, 500, 999])
    noisy, wanted = objective_for(SD, scheduler).noised(x, noise, t)
    torch.testing.assert_close(noisy, peer.add_noise(x, noise, t))
    torch.testing.assert_close(wanted, noise if target == "epsilon" else peer.get_velocity(x, noise, t))


def test_flow_noise_is_that_of_the_euler_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = objective_for(FLUX, scheduler)
    assert objective == Flow(3.0)
    x, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    times = scheduler.timesteps[[100, 900]]
    noisy, target = objective.noised(x, noise, times / 1000)
    torch.testing.assert_close(noisy, scheduler.scale_noise(x, times, noise))
    torch.testing.assert_close(noisy - (times / 1000).view(-1, 1, 1, 1) * target, x)


def test_times_are_drawn_from_the_generator_alone() -> None:
    for objective in (objective_for(SD, DDIMScheduler()), Flow(2.0)):
        draws = [objective.draw(5, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        grid = objective.grid(8)
        assert torch.equal(grid, grid.sort().values)
