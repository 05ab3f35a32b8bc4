"""What the base knows of a class is kept: by the base as teacher, and by pictures that it draws once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion import ConfigError, TrainConfig, train
from lora_diffusion.families import family_of
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.training.loop import Run
from lora_diffusion.training.preparation import prepare
from lora_diffusion.training.processes import Processes
from tests.training.pictures import pack, settings

TEACHER = {"kind": "teacher", "subject": "dog"}
PICTURES = {"kind": "pictures", "subject": "dog", "pictures": 3, "steps": 2}


def given(root: Path, prior: dict[str, Any], **train_settings: Any) -> TrainConfig:
    made = settings(root, **train_settings)
    made["data"]["trigger"] = "sks"
    return TrainConfig.parse(made | {"prior": prior})


def run_of(config: TrainConfig) -> Run:
    opened = load_pipeline(config.base, precision="fp32", device="cpu")
    family = family_of(opened.pipe)
    return Run(config, opened, family, prepare(config, opened, family, lambda done, total: None), Processes("cpu"))


def test_the_teacher_is_the_base_under_the_class_name(tmp_path: Path) -> None:
    run = run_of(given(tmp_path, TEACHER | {"weight": 2.0}))
    batch = run.data.draw(0)
    assert [p.item() for p in run.judge.parts(batch, 0)][1] == 0  # a fresh adapter says what the base says
    for name, parameter in run.trained.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(0, 0.1)
    first, second = run.judge.parts(batch, 0)
    assert second.item() > 0
    generator = torch.Generator().manual_seed(0)
    noise, times = torch.randn(batch.latents.shape, generator=generator), torch.tensor([10, 500])
    found = run.judge._from_the_base(batch, noise, times)
    noisy, _ = run.judge.objective.noised(batch.latents, noise, times)
    answers = []
    for weight in (0.0, 1.0):
        run.trained.weigh(weight)
        with torch.no_grad():
            answers.append(run.family.predict(run.denoiser, noisy, times, batch.plain))
    torch.testing.assert_close(found, (answers[1] - answers[0]).square().mean())
    heard, class_heard = batch.conditioning["states"], batch.plain["states"]
    assert heard.shape == class_heard.shape
    assert not torch.equal(heard, class_heard)
    assert first.requires_grad
    assert second.requires_grad


def test_a_teacher_keeps_the_class_where_training_without_one_moves_it(tmp_path: Path) -> None:
    moved: dict[str, float] = {}
    for name, prior in {"without": TEACHER | {"weight": 1e-9}, "with": TEACHER | {"weight": 30.0}}.items():
        run = run_of(given(tmp_path, prior, steps=12, lr=1e-2))
        for run.step in range(12):
            run._one_step()
        batch = run.data.draw(0)
        with torch.no_grad():
            drift = run.judge._from_the_base(batch, torch.ones_like(batch.latents), torch.tensor([100, 600]))
        moved[name] = drift.item()
    assert moved["with"] < 0.5 * moved["without"]


def test_class_pictures_are_drawn_once_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    config = given(tmp_path, PICTURES, steps=1)
    losses = train(config).losses
    (folder,) = (tmp_path / "out" / "class-pictures").iterdir()
    drawn = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert list(drawn) == ["0000.png", "0001.png", "0002.png"]
    assert len(set(drawn.values())) == 3
    (folder / "0001.png").unlink()
    stamp = (folder / "0000.png").stat().st_mtime_ns
    train(config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn
    assert (folder / "0000.png").stat().st_mtime_ns == stamp
    plain = train(given(tmp_path, {}, steps=1).changed(f"output={tmp_path / 'plain'}")).losses
    assert losses[0] > plain[0]


def test_class_pictures_of_ones_own_are_used_with_their_captions(tmp_path: Path) -> None:
    pack(tmp_path / "dogs", 3)
    (tmp_path / "dogs" / "1.txt").unlink()
    run = run_of(given(tmp_path, {"kind": "pictures", "subject": "dog", "folder": str(tmp_path / "dogs")}))
    assert run.prepared.prior is not None
    assert len(run.prepared.prior.items) == 3
    assert not any("dogs" in item.name for item in run.data.items)
    assert not list((tmp_path / "out").glob("class-pictures"))


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        ({"kind": "teacher"}, r"needs data\.trigger, the new word, and prior\.subject"),
        ({"kind": "pictures"}, r"needs prior\.folder, or prior\.subject"),
        ({"subject": "dog"}, r"do nothing while prior\.kind is 'none'"),
        ({"kind": "pupil"}, r"prior\.kind = 'pupil'"),
    ],
)
def test_a_prior_without_what_it_needs_is_refused(tmp_path: Path, prior: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        given(tmp_path, prior)


def test_folders_shares_variants_and_resolutions_reach_the_batches(tmp_path: Path) -> None:
    made = settings(tmp_path)
    pack(tmp_path / "more", 2)
    for i in range(2):
        (tmp_path / "more" / f"{i}.txt").write_text("one, two, three, four", "utf-8")
    more = {"folder": str(tmp_path / "more"), "weight": 0.5, "repeats": 3}
    made["data"] |= {"folders": [more], "heldout": 0.0, "resolutions": [16], "shuffle": True, "caption_variants": 3}
    run = run_of(TrainConfig.parse(made))
    shares = {item.name: item.share for item in run.data.items if "more" in item.name}
    assert set(shares.values()) == {0.75}  # half of 3, over two resolutions
    assert len(run.data.items) == 16
    assert {len(item.captions) for item in run.data.items if "more" in item.name} == {3}
    assert {item.latents.shape[-1] for item in run.data.items} == {8, 16}
