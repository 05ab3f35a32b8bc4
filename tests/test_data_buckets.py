"""Buckets: within the area, in steps, never enlarged unasked; views cut exactly what they say."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.data.buckets import BucketRules, View, buckets, cut, views
from lora_diffusion.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"), [(512, 64, 2.0), (1024, 64, 4.0), (64, 8, 1.5), (96, 32, 1.0)]
)
def test_every_bucket_keeps_area_step_and_aspect_and_comes_in_both_orientations(
    resolution: int, step: int, aspect: float
) -> None:
    found = buckets(resolution, step, aspect)
    assert len(set(found)) == len(found)
    assert set(found) == {(h, w) for w, h in found}
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) / min(width, height) <= aspect
        assert min(width, height) * (max(width, height) + step) > resolution**2 or width == height
    assert (resolution, resolution) in found


def test_a_picture_goes_to_the_bucket_of_its_shape() -> None:
    rules = BucketRules(resolutions=(512,))
    assert views((2000, 2000), rules, seed=0)[0].bucket == (512, 512)
    assert views((2600, 2000), rules, seed=0)[0].bucket == (576, 448)
    assert views((2000, 2600), rules, seed=0)[0].bucket == (448, 576)
    assert views((9000, 1000), rules, seed=0)[0].bucket == (640, 384)


@pytest.mark.parametrize("upscale", [False, True])
def test_views_of_any_size_lie_inside_the_picture_and_respect_upscaling(upscale: bool) -> None:
    random = Random(1)
    rules = BucketRules(
        resolutions=(96, 128), step=8, max_aspect=2.0, upscale=upscale, crop="random", crops=2, flip=True
    )
    for _ in range(400):
        size = random.randint(8, 400), random.randint(8, 400)
        for view in views(size, rules, seed=3, key=str(size)):
            (width, height), (scaled_width, scaled_height) = view.bucket, view.scaled
            assert width % 8 == height % 8 == 0
            assert width * height <= 128**2
            assert max(width, height) <= 2 * min(width, height)
            assert 0 <= view.left <= scaled_width - width
            assert 0 <= view.top <= scaled_height - height
            assert width == scaled_width or height == scaled_height  # nothing is cut that need not be
            assert upscale or (scaled_width <= size[0] and scaled_height <= size[1])


def test_small_pictures_get_a_bucket_of_their_own_size_or_are_refused() -> None:
    rules = BucketRules(resolutions=(512,), step=64)
    assert views((200, 150), rules, seed=0)[0].bucket == (192, 128)
    assert views((200, 150), BucketRules(upscale=True), seed=0)[0].bucket == (576, 448)
    with pytest.raises(DataError, match="40x300 pixels are less than one step of 64"):
        views((40, 300), rules, seed=0)


def test_several_resolutions_crops_and_flips_multiply() -> None:
    rules = BucketRules(resolutions=(256, 512), crop="random", crops=3, flip=True)
    found = views((1000, 700), rules, seed=0, key="a")
    assert len(found) == 2 * 3 * 2
    assert found == views((1000, 700), rules, seed=0, key="a")
    assert found != views((1000, 700), rules, seed=0, key="b")
    assert found != views((1000, 700), rules, seed=1, key="a")


def test_a_picture_too_small_for_two_resolutions_is_not_seen_twice() -> None:
    assert len(views((256, 256), BucketRules(resolutions=(512, 1024)), seed=0)) == 1


def test_cut_gives_the_pixels_the_view_names() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    plain = View(bucket=(32, 40), scaled=(64, 48), left=10, top=3, flipped=False, original=(64, 48))
    mirrored = View(bucket=(32, 40), scaled=(64, 48), left=10, top=3, flipped=True, original=(64, 48))
    assert np.array_equal(np.asarray(cut(image, plain)), pixels[3:43, 10:42])
    assert np.array_equal(np.asarray(cut(image, mirrored)), pixels[3:43, 10:42][:, ::-1])
    half = views((64, 48), BucketRules(resolutions=(32,), step=8, max_aspect=2), seed=0)[0]
    assert cut(image, half).size == half.bucket
    with pytest.raises(DataError, match="was cut by the view of"):
        cut(image.resize((10, 10)), plain)


def test_micro_conditioning_is_in_sdxls_order_and_counts_from_the_visible_left() -> None:
    view = View(bucket=(32, 40), scaled=(64, 48), left=10, top=3, flipped=False, original=(128, 96))
    assert view.micro_conditioning == (96, 128, 3, 10, 40, 32)
    mirrored = View(bucket=(32, 40), scaled=(64, 48), left=10, top=3, flipped=True, original=(128, 96))
    assert mirrored.micro_conditioning == (96, 128, 3, 64 - 32 - 10, 40, 32)


@pytest.mark.parametrize(
    "wrong", [{"crop": "middle"}, {"resolutions": ()}, {"resolutions": (32,)}, {"max_aspect": 0.5}, {"crops": 0}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        BucketRules(**wrong)
