"""One pass that names every unusable picture before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.data.buckets import BucketRules
from lora_diffusion.data.prepare import prepare
from lora_diffusion.errors import DataError

SIZES = BucketRules(resolutions=(64,), step=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("good", "cut", "masked"):
        Image.effect_noise((80, 70), 90).convert("RGB").save(tmp_path / f"{name}.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    (tmp_path / "masks").mkdir()
    Image.new("L", (20, 20)).save(tmp_path / "masks/masked.png")
    return tmp_path


def test_every_bad_picture_is_listed_with_its_fault(folder: Path) -> None:
    with pytest.raises(DataError, match="4 of 5 pictures cannot be used") as caught:
        prepare(folder, sizes=SIZES, fallback_caption="x")
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 4
    for name, fault in {"cut": "truncated", "page": "no picture", "tiny": "4x4", "masked": "the mask is 20x20"}.items():
        assert any(name in line and fault in line for line in lines)


def test_skip_bad_goes_on_and_reports_what_was_left_out(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = prepare(
        folder,
        sizes=SIZES,
        fallback_caption="x",
        skip_bad=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [item.example.picture.name for item in result.items] == ["good.png"]
    assert {path.name for path in result.skipped} == {"cut.png", "page.jpg", "tiny.png", "masked.png"}
    assert "1 pictures, 1 views" in str(result)
    assert str(result).count("left out") == 4
    assert seen == [(n, 5) for n in range(1, 6)]


def test_skip_bad_with_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(DataError, match="nothing is left"):
        prepare(tmp_path, fallback_caption="x", skip_bad=True)


def test_a_picture_below_one_step_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (40, 200)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"thin\.png: 40x200 pixels are less than one step of 64"):
        prepare(tmp_path, fallback_caption="x")


def test_the_same_seed_prepares_the_same_views(folder: Path) -> None:
    def once(seed: int) -> object:
        rules = BucketRules(resolutions=(32,), step=8, crop="random", crops=2)
        return prepare(folder, sizes=rules, fallback_caption="x", skip_bad=True, seed=seed).items

    assert once(1) == once(1)
    assert once(1) != once(2)


def test_skip_bad_goes_on_without_captions_and_records_too(folder: Path) -> None:
    (folder / "good.txt").write_text("a caption")
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(DataError, match="4 of 5 pictures cannot be used and 1 metadata") as caught:
        prepare(folder, sizes=SIZES)
    assert "or go on without them by --skip-bad" in str(caught.value)
    assert "cut.png: has no caption" in str(caught.value)
    result = prepare(folder, sizes=SIZES, skip_bad=True)
    assert [item.example.picture.name for item in result.items] == ["good.png"]
    assert len(result.skipped) == 5
