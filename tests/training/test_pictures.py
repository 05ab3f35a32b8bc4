"""Pictures and captions before training: listed where they cannot be used, cached under all that they depend on."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_diffusion import TrainConfig, train
from lora_diffusion.families import family_of
from lora_diffusion.inspection.report import write_report
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.training.preparation import prepare
from lora_diffusion.training.results import TrainResult
from tests.cli.test_cli import run, toml
from tests.training.pictures import config, settings


def prepared(given: TrainConfig) -> Any:
    """What `given` trains on, and the pipeline afterwards."""
    opened = load_pipeline(given.base, precision="fp32", device="cpu")
    return prepare(given, opened, family_of(opened.pipe), lambda done, total: None), opened.pipe


def files(root: Path) -> dict[str, int]:
    """Name -> when it was written, of all cached files."""
    return {path.name: path.stat().st_mtime_ns for path in (root / "out" / "cache").rglob("*.safetensors")}


def test_what_is_left_out_is_said_at_once_and_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(tmp_path, steps=1)
    (tmp_path / "pack" / "3.png").write_bytes(b"nothing")
    (tmp_path / "pack" / "4.txt").unlink()
    file = toml(tmp_path / "run.toml", given)
    assert run(monkeypatch, "train", file) == 2
    told = capsys.readouterr()
    assert "2 of 6 pictures cannot be used" in told.out + told.err
    assert run(monkeypatch, "train", file, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "2 left out" in said
    assert "3.png: is no picture" in said
    assert "4.png: has no caption" in said
    assert len(TrainResult.read(tmp_path / "out").left_out) == 2
    assert "4.png: has no caption" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_resumed_run_says_from_where_and_what_is_different(tmp_path: Path) -> None:
    train(config(tmp_path))
    heard: list[str] = []
    result = train(config(tmp_path, checkpoint_every=3), lambda step: heard.append(step.said))
    assert [said for said in heard if said] == [
        "goes on from step-000006; changed since: train.checkpoint_every: 2 -> 3"
    ]
    assert write_report(config(tmp_path), result)[0].is_file()


def _another_caption(root: Path, given: dict[str, Any]) -> None:
    (root / "pack" / "0.txt").write_text("something else", "utf-8")


def _another_picture(root: Path, given: dict[str, Any]) -> None:
    Image.new("RGB", (32, 32), "red").save(root / "pack" / "0.png")


def _another_vae(root: Path, given: dict[str, Any]) -> None:
    path = root / "base" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))


def _another_tokenizer(root: Path, given: dict[str, Any]) -> None:
    path = root / "base" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 20}))


def _another_background(root: Path, given: dict[str, Any]) -> None:
    given["data"]["background"] = "#102030"


def _another_encoder(root: Path, given: dict[str, Any]) -> None:
    opened = load_pipeline(root / "base", precision="fp32", device="cpu").pipe.text_encoder
    next(opened.parameters()).data.add_(1)
    opened.save_pretrained(root / "base" / "text_encoder")


@pytest.mark.parametrize(
    ("change", "latents", "texts"),
    [
        (_another_caption, 0, 1),
        (_another_picture, 1, 0),
        (_another_vae, 6, 0),
        (_another_tokenizer, 0, 7),  # six captions and none
        (_another_encoder, 0, 7),
        (_another_background, 6, 0),
        (lambda root, given: given["data"].update(flip=True), 4, 0),  # two are held out as they are
        (lambda root, given: given["data"].update(trigger="sks"), 0, 6),
        (lambda root, given: given["train"].update(lr=1.0), 0, 0),
    ],
)
def test_a_cached_tensor_is_made_again_where_what_it_depends_on_is_another(
    tmp_path: Path, change: Callable[[Path, dict[str, Any]], None], latents: int, texts: int
) -> None:
    given = settings(tmp_path)
    prepared(TrainConfig.parse(given))
    before = files(tmp_path)
    assert len(before) == 13
    change(tmp_path, given)
    prepared(TrainConfig.parse(given))
    after = files(tmp_path)
    assert before.items() <= after.items(), "what is there is not written again"
    assert len(after) - len(before) == latents + texts


def test_half_a_cached_file_is_made_again(tmp_path: Path) -> None:
    whole, _ = prepared(config(tmp_path))
    for path in (tmp_path / "out" / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    again, _ = prepared(config(tmp_path))
    for one, other in zip(whole.training.items, again.training.items, strict=True):
        assert torch.equal(one.latents, other.latents)
    assert all(torch.equal(rows, again.training.table[name]) for name, rows in whole.training.table.items())


def test_vae_and_text_encoders_leave_memory_and_training_goes_on(tmp_path: Path) -> None:
    given = config(tmp_path, "flux")
    opened = load_pipeline(given.base, precision="fp32", device="cpu")
    names = ("vae", "text_encoder", "text_encoder_2")
    parts = [weakref.ref(p) for name in names for p in getattr(opened.pipe, name).parameters()]
    assert all(part() is not None for part in parts)
    held = prepare(given, opened, family_of(opened.pipe), lambda done, total: None)
    gc.collect()
    assert not any(part() is not None for part in parts)
    assert held.training.items


def test_transparent_pictures_are_laid_on_the_chosen_background(tmp_path: Path) -> None:
    given = settings(tmp_path)
    for path in (tmp_path / "pack").glob("*.png"):
        Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(path)
    made = {}
    for colour in ("white", "black"):
        given["data"]["background"] = colour
        made[colour] = prepared(TrainConfig.parse(given))[0].training.items[0].latents
    opened = load_pipeline(given["base"], precision="fp32", device="cpu")
    for colour, value in (("white", 1.0), ("black", -1.0)):
        with torch.no_grad():
            wanted = family_of(opened.pipe).encode_pictures(opened.pipe, torch.full((1, 3, 32, 32), value))[0]
        torch.testing.assert_close(made[colour], wanted)
    with pytest.raises(ValueError, match=r"data\.background is 'whit'"):
        TrainConfig.parse(given | {"data": given["data"] | {"background": "whit"}})


def test_fewer_class_pictures_than_were_drawn_before_are_used(tmp_path: Path) -> None:
    prior = {"kind": "pictures", "subject": "dog", "steps": 1}
    for count in (3, 2):
        held, _ = prepared(TrainConfig.parse(settings(tmp_path) | {"prior": prior | {"pictures": count}}))
        assert len(held.prior.items) == count
    assert len(list((tmp_path / "out" / "class-pictures").rglob("*.png"))) == 3
