"""The base's measures: retrieval ranks and colour distance are what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "base" / "retrieval.py"


@pytest.fixture(scope="module")
def retrieval():
    spec = importlib.util.spec_from_file_location("retrieval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_true_pictures_find_themselves_first(retrieval, pictures):
    features = retrieval.pixel_features(pictures)
    assert retrieval.ranks(features, features, torch.arange(12)).tolist() == [0] * 12


def test_a_wrong_answer_ranks_behind_the_picture_it_looks_like(retrieval, pictures):
    features = retrieval.pixel_features(pictures)
    places = retrieval.ranks(features[:6], features, torch.arange(6, 12))
    assert (places >= 1).all()
    assert (places <= 11).all()


def test_noise_leaves_the_rank_and_chance_is_even(retrieval):
    random = torch.Generator().manual_seed(1)
    gallery = torch.randn(200, 32, generator=random)
    assert (
        retrieval.ranks(gallery + 0.1 * torch.randn(200, 32, generator=random), gallery, torch.arange(200)) == 0
    ).all()
    places = retrieval.ranks(torch.randn(200, 32, generator=random), gallery, torch.arange(200)).float()
    assert places.mean() == pytest.approx(99.5, abs=15)


def test_colour_distance_is_zero_for_moved_pixels_and_two_for_other_colours(retrieval, pictures):
    moved = pictures.flatten(2)[:, :, torch.randperm(64 * 64)].view_as(pictures)
    assert retrieval.colour_distance(pictures, moved).abs().max() < 1e-6
    black, white = torch.zeros_like(pictures), torch.full_like(pictures, 255)
    assert retrieval.colour_distance(black, white).tolist() == [2.0] * 12
    half = black.clone()
    half[..., :32] = 255
    assert retrieval.colour_distance(half, white).tolist() == [1.0] * 12
