"""The tiny pipelines are what other tests take them for: seeded, prompt-sensitive, stock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import tiny

FAMILIES = {"sd": tiny.sd, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_draws_the_same_picture_and_prompt_and_seed_matter(family: str) -> None:
    build = FAMILIES[family]
    first = tiny.picture(build())
    assert first.shape == (1, tiny.PICTURE, tiny.PICTURE, 3)
    assert np.array_equal(first, tiny.picture(build()))
    assert not np.array_equal(first, tiny.picture(build(), "a blue cat"))
    assert not np.array_equal(first, tiny.picture(build(seed=1)))


def test_pipeline_survives_the_disk(tmp_path: Path) -> None:
    pipe = tiny.flux()
    pipe.save_pretrained(tmp_path)
    assert np.array_equal(tiny.picture(type(pipe).from_pretrained(tmp_path)), tiny.picture(pipe))
