"""The sample packs are what their manifests say: pictures, captions, nothing held out inside, licences."""

import tomllib
from pathlib import Path

import pytest
from PIL import Image

SAMPLES = Path(__file__).parents[2] / "samples"
STYLES = ("ink", "clay", "sticker")
PACKS = (*STYLES, "kiki")


def captions(folder: Path) -> list[str]:
    return [path.read_text("utf-8").strip() for path in sorted(folder.glob("*.txt"))]


def manifest(name: str) -> dict:
    return tomllib.loads((SAMPLES / "packs" / name / "pack.toml").read_text("utf-8"))


@pytest.mark.parametrize("name", [*PACKS, "plain"])
def test_every_picture_opens_and_has_a_caption(name):
    pictures = sorted((SAMPLES / "packs" / name).rglob("*.png"))
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert (picture.mode, picture.size) == ("RGB", (64, 64)), path
        assert path.with_suffix(".txt").read_text("utf-8").strip(), path


@pytest.mark.parametrize("name", [*PACKS, "plain"])
def test_no_caption_is_without_a_picture(name):
    assert all(path.with_suffix(".png").exists() for path in (SAMPLES / "packs" / name).rglob("*.txt"))


@pytest.mark.parametrize("name", PACKS)
def test_held_out_things_are_not_trained_on(name):
    folder = SAMPLES / "packs" / name
    trained, heldout = captions(folder), captions(folder / "heldout")
    assert not set(trained) & set(heldout)
    assert sorted(manifest(name)["heldout"]) == sorted(heldout)


def test_no_style_pack_trains_on_what_another_holds_out():
    folders = [SAMPLES / "packs" / name for name in STYLES]
    trained = {caption for folder in folders for caption in captions(folder)}
    assert not trained & {caption for folder in folders for caption in captions(folder / "heldout")}


@pytest.mark.parametrize("name", STYLES)
def test_style_packs_have_the_size_they_claim(name):
    folder = SAMPLES / "packs" / name
    assert 40 <= len(captions(folder)) <= 130
    assert 25 <= len(captions(folder / "heldout")) <= 40


def test_kiki_is_taught_in_eight_roles_and_named_in_every_caption():
    folder = SAMPLES / "packs" / "kiki"
    taught, others = captions(folder), captions(folder / "heldout")
    assert len(taught) == 8
    assert len(others) >= 20
    assert all(caption.startswith("kiki woman ") for caption in taught + others)
    assert {f"kiki {caption}" for caption in captions(folder / "class")} == set(taught + others)


@pytest.mark.parametrize("name", [*PACKS, "plain"])
def test_licence_and_credit_stand_beside_the_pictures(name):
    told = manifest(name)
    readme = (SAMPLES / "packs" / name / "README.md").read_text("utf-8")
    assert told["licence"] in readme
    assert told["credit"] in readme
    assert any(told["licence"].split("-")[0] in path.name for path in (SAMPLES / "LICENSES").iterdir())


def test_packs_stay_small():
    assert sum(path.stat().st_size for path in (SAMPLES / "packs").rglob("*.png")) < 1_500_000
