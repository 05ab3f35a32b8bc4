"""The style score is near 0 for the base's own style, near 1 for true pictures of the pack, and grows in between."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.errors import DataError
from lora_diffusion.inspection.style import StyleProbe, style_features, style_score

PACKS = Path(__file__).parents[2] / "samples" / "packs"


def pictures(folder: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((PACKS / folder).glob("*.png"))]


@pytest.fixture(scope="module")
def plain():
    return pictures("plain")


@pytest.fixture(scope="module")
def probe(plain):
    return StyleProbe.fit(pictures("ink"), plain)


@pytest.mark.parametrize(("name", "least"), [("ink", 0.95), ("clay", 0.85), ("sticker", 0.85)])
def test_true_held_out_pictures_score_near_one_and_unseen_plain_ones_near_zero(name, least, plain):
    probe = StyleProbe.fit(pictures(name), plain[::2])
    truth, others = pictures(f"{name}/heldout"), plain[1::2]
    assert probe.score(truth) >= least
    assert probe.score(others) <= 1 - least
    assert probe.accuracy(truth, others) >= least - 0.05


def test_score_grows_from_plain_to_style(probe, plain):
    truth = pictures("ink/heldout")
    pairs = list(zip(plain, truth, strict=False))
    mixes = [[Image.blend(a, b, t) for a, b in pairs] for t in (0.0, 0.5, 1.0)]
    low, middle, high = (probe.score(mix) for mix in mixes)
    assert low < middle < high


def test_size_and_mode_of_a_picture_do_not_matter_much(probe):
    truth = pictures("ink/heldout")
    large = [picture.resize((256, 256)).convert("RGBA") for picture in truth]
    assert probe.score(large) == pytest.approx(probe.score(truth), abs=0.1)


def test_score_is_deterministic_and_ignores_order(probe, plain):
    truth = pictures("ink/heldout")
    assert style_score(truth[::-1], pictures("ink")[::-1], plain) == pytest.approx(probe.score(truth))


def test_a_white_picture_has_finite_features():
    features = style_features([Image.new("RGB", (64, 64), "white")])
    assert features.shape == (1, 123)
    assert np.isfinite(features).all()


def test_too_few_pictures_and_like_sets_are_errors(probe, plain):
    with pytest.raises(DataError, match="3 pictures as references"):
        StyleProbe.fit(plain[:3], plain)
    with pytest.raises(DataError, match="look alike"):
        StyleProbe.fit(plain, plain)
    with pytest.raises(DataError, match="no pictures"):
        probe.score([])
