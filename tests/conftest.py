"""Settings every test shares: one torch thread, no network, small seeded pipelines as fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from tests import tiny

torch.set_num_threads(1)  # two threads on two busy cores are 20 times slower on models this small


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same global random state and leaves it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def sd() -> StableDiffusionPipeline:
    """A fresh tiny Stable Diffusion 1.x pipeline."""
    return tiny.sd()


@pytest.fixture
def sdxl() -> StableDiffusionXLPipeline:
    """A fresh tiny SDXL pipeline."""
    return tiny.sdxl()


@pytest.fixture
def sd3() -> StableDiffusion3Pipeline:
    """A fresh tiny SD3 pipeline."""
    return tiny.sd3()


@pytest.fixture
def flux() -> FluxPipeline:
    """A fresh tiny FLUX.1 pipeline (guidance-distilled, like dev)."""
    return tiny.flux()
