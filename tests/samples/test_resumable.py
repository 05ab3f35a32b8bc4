"""The base's training runs stop and go on, and their rates are what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "base" / "resumable.py"


@pytest.fixture(scope="module")
def resumable():
    spec = importlib.util.spec_from_file_location("resumable", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["resumable"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(resumable, tmp_path):
    def start(samples: int):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        rate = resumable.steady(samples)
        return resumable.Run(tmp_path / "x.state", model, lr=0.05, samples=samples, batch=8, rate=rate)

    return start


def line(run):
    def loss(count, random):
        x = torch.randn(count, 3, generator=random)
        return (run.model(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


def test_a_run_learns_and_a_longer_one_goes_on_from_it(start):
    first = start(1600)
    before = line(first)(256, first.random).item()
    assert first.train(line(first), budget=60)
    second = start(3200)
    assert second.seen == 1600
    assert torch.equal(second.model.weight, first.model.weight)
    assert second.train(line(second), budget=60)
    assert second.seen == 3200
    assert line(second)(256, second.random).item() < before / 10
    assert second.seconds >= first.seconds


def test_a_budget_stops_a_run_and_saves_it(start):
    run = start(10**9)
    assert not run.train(line(run), budget=0.2)
    assert start(10**9).seen == run.seen > 0


def test_average_follows_the_weights_and_can_be_used(start):
    run = start(1600)
    run.train(line(run), budget=60)
    assert not torch.equal(run.average["weight"], run.model.weight)
    run.use_average()
    assert torch.equal(run.average["weight"], run.model.weight)


def test_steady_rate_does_not_depend_on_the_end_until_it_cools(resumable):
    short, long = resumable.steady(10_000, cool=2_000, warm=100), resumable.steady(90_000, warm=100)
    assert [short(seen) for seen in (0, 50, 99, 5_000, 8_000)] == [long(seen) for seen in (0, 50, 99, 5_000, 8_000)]
    assert short(9_000) == pytest.approx(0.5)
    assert short(10_000) == pytest.approx(0.01)


def test_cosine_rate_ends_at_two_percent(resumable):
    rate = resumable.cosine(1000)
    assert rate(500) == pytest.approx(0.51)
    assert rate(1000) == pytest.approx(0.02)
