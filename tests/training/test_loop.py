"""The whole road on tiny pipelines: learn, save, go on, say what happened."""

from __future__ import annotations

import functools
import json
import math
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from lora_diffusion import AdapterStack, LoraDiffusionError, TrainConfig, TrainResult, load_adapter, train
from lora_diffusion.errors import ConfigError, DataError
from lora_diffusion.training import watching
from lora_diffusion.training.batches import Batch, Batches
from lora_diffusion.training.checkpoints import CheckpointError, find_checkpoints
from lora_diffusion.training.config import override
from lora_diffusion.training.results import DivergedError, Progress
from tests import tiny
from tests.training.pictures import config, cut_off, interrupted, settings
from tests.training.test_priors import run_of


def test_nf4_training_lowers_the_loss_and_no_backbone_byte_changes(tmp_path: Path) -> None:
    result = train(config(tmp_path, steps=30, batch=4, lr=1e-2))
    assert result.backbone_unchanged
    assert result.report is not None
    assert any(layer.stored == "nf4" for layer in result.report.layers)
    assert np.mean(result.losses[-8:]) < np.mean(result.losses[:8])
    assert result.adapter is not None
    said = load_adapter(result.adapter).metadata
    assert (said["modelspec.title"], said["modelspec.resolution"]) == ("blocks", "32x32")
    assert (said["modelspec.prediction_type"], said["ss_steps"], said["ss_optimizer"]) == ("epsilon", "30", "adamw")
    facts = json.loads(said["lora_diffusion"])
    assert (facts["base_precision"], len(facts["base_sha256"])) == ("nf4", 64)
    (tags,) = json.loads(said["ss_tag_frequency"]).values()
    assert sum(tags.values()) >= int(said["ss_num_train_images"])
    assert all(said.values())


@pytest.mark.parametrize("base", ["sd", "flux"])
def test_what_it_writes_draws_the_same_in_diffusers(tmp_path: Path, base: str) -> None:
    given = settings(tmp_path, base, lr=3e-2)
    given["adapter"] |= {"rank": 4, "alpha": 7.0}

    result = train(TrainConfig.parse(given))
    assert result.adapter is not None
    pipe, peer = (DiffusionPipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    plain = tiny.picture(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(result.adapter)
        ours = tiny.picture(pipe)
    peer.load_lora_weights(result.adapter)
    np.testing.assert_allclose(ours, tiny.picture(peer), atol=1e-5)
    assert np.abs(ours - plain).max() > 1e-3


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first = train(config(tmp_path)).adapter
    assert first is not None
    content = first.read_bytes()
    again = settings(tmp_path)
    again["output"] = str(tmp_path / "again")
    other = settings(tmp_path, seed=1)
    other["output"] = str(tmp_path / "other")

    made = [train(TrainConfig.parse(given)).adapter for given in (again, other)]
    assert all(made)
    assert made[0].read_bytes() == content  # type: ignore[union-attr]
    assert made[1].read_bytes() != content  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("stop_after", "changes"),
    [
        (1, ()),
        (5, ()),
        (3, ("loss.snr_gamma=5.0", "loss.kind=huber")),
        (3, ("train.ema=0.3", "train.ema_saved=beside")),
    ],
    ids=str,
)
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, stop_after: int, changes: tuple[str, ...]
) -> None:
    whole = settings(tmp_path)
    for change in changes:
        override(whole, change)
    whole["output"] = str(tmp_path / "whole")
    whole["adapter"]["dropout"] = 0.2

    expected = train(TrainConfig.parse(whole)).adapter
    broken = TrainConfig.parse(whole | {"output": str(tmp_path / "broken")})

    stopped = interrupted(broken, stop_after)
    assert stopped.backbone_unchanged
    assert stopped.steps in (stop_after, stop_after + 1)
    finished = train(broken)
    assert finished.adapter is not None
    assert expected is not None
    for path in expected.parent.glob("*.safetensors"):
        assert (finished.adapter.parent / path.name).read_bytes() == path.read_bytes()


def test_changed_settings_are_refused_on_resume(tmp_path: Path) -> None:
    train(config(tmp_path))
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.005 -> 0\.1"):
        train(config(tmp_path, lr=0.1))


def test_old_checkpoints_go_after_new_ones_are_complete(tmp_path: Path) -> None:
    train(config(tmp_path))
    assert [path.name for path in find_checkpoints(tmp_path / "out" / "checkpoints")] == ["step-000006"]


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_diffusion.training import checkpoints

    write, calls = checkpoints._write, []

    def full(draft: Path, checkpoint: checkpoints.Checkpoint) -> None:
        calls.append(draft)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(draft, checkpoint)

    monkeypatch.setattr(checkpoints, "_write", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; step-000002 is complete"):
        train(config(tmp_path))
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(("owner", "name"), [(watching, "write_picture"), (TrainResult, "write")])
def test_a_disk_that_is_full_at_any_other_file_is_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    watched = config(tmp_path).changed('watch.prompts=["x"]', "watch.every=3", "watch.steps=1", "watch.pictures=1")
    whole = train(watched.changed(f"output={tmp_path / 'whole'}")).adapter
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device; step-00000\d is compl"):
            train(watched)
    again = train(watched).adapter
    assert again is not None
    assert whole is not None
    assert again.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a child's files as a quota does")
def test_a_quota_that_is_met_in_the_middle_of_a_checkpoint_loses_no_finished_one(tmp_path: Path) -> None:
    """The kernel refuses the write, half of the file is there."""
    whole = train(config(tmp_path).changed(f"output={tmp_path / 'whole'}")).adapter
    assert whole is not None
    cut_off(config(tmp_path), 3)
    found = find_checkpoints(tmp_path / "out" / "checkpoints")
    assert [path.name for path in found] == ["step-000002"]
    child = os.fork()
    if not child:  # the limit is this process's alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            train(config(tmp_path))
        except CheckpointError as error:
            os._exit(0 if "step-000002 is complete and stays" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000002"]
    again = train(config(tmp_path)).adapter
    assert again is not None
    assert again.read_bytes() == whole.read_bytes()


def test_a_run_whose_rate_explodes_names_step_and_pictures_and_keeps_nothing_broken(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 2 \(pictures '.*png', '.*png'\): loss .*nothing good was learned"):
        train(config(tmp_path, lr=1e30, steps=20))
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("at", [1, 4])
def test_a_run_that_meets_what_is_no_number_stops_at_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """As it was after step 3, which is newer than the last checkpoint, and can be gone on from."""
    whole = train(config(tmp_path, steps=3, warmup=0)).adapter
    assert whole is not None
    draw = Batches.draw

    def spoiled(batches: Batches, index: int) -> Batch:
        batch = draw(batches, index)
        return replace(batch, latents=batch.latents * math.nan) if index + 1 == at else batch

    monkeypatch.setattr(Batches, "draw", spoiled)
    broken = config(tmp_path, steps=9, warmup=0).changed(f"output={tmp_path / 'broken'}")
    good = "nothing good was learned" if at == 1 else r"blocks-step-000003\.safetensors is the last good state"
    with pytest.raises(DivergedError, match=rf"step {at} \(pictures .*loss nan.*{good}"):
        train(broken)
    made = list((tmp_path / "broken").glob("*.safetensors"))
    assert len(made) == (at > 1)
    for path in made:
        assert load_adapter(path).layers == load_adapter(whole).layers
        monkeypatch.setattr(Batches, "draw", draw)
        assert train(broken.changed(f"adapter.init_from={path}", f"output={tmp_path / 'on'}")).adapter


def test_where_the_present_state_is_broken_the_checkpoint_s_is_kept(tmp_path: Path) -> None:
    def explode(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 3:
            for parameter in runs[0].trained.parameters():
                parameter.data.mul_(1e30)

    run = run_of(config(tmp_path, steps=9))
    runs = [run]
    with pytest.raises(DivergedError, match=r"step 4 .*blocks-step-000002\.safetensors is the last good state"):
        run.go(explode)
    kept = load_adapter(tmp_path / "out" / "blocks-step-000002.safetensors")
    assert all(t.abs().max() < 1e3 for *_, layer in kept for t in layer.tensors.values())


def test_checkpointed_activations_train_the_same_bits_dropout_included(tmp_path: Path) -> None:
    given = settings(tmp_path, steps=3)
    given["adapter"]["dropout"] = 0.2
    forgetful = TrainConfig.parse(given | {"output": str(tmp_path / "forgetful")}).changed("train.checkpointing=true")
    made = [train(TrainConfig.parse(given)).adapter, train(forgetful).adapter]
    ours, theirs = (load_adapter(path) for path in made if path)
    assert ours == theirs


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("data", "folder", "nowhere"), "nowhere"),
        (("base", None, "nowhere/at/all"), "no Diffusers folder"),
        (("adapter", "targets", "atention"), "did you mean 'attention'"),
        (("adapter", "method", "lorra"), "did you mean 'lora'"),
    ],
)
def test_bad_settings_are_one_clear_sentence(tmp_path: Path, change: tuple[str, str | None, str], match: str) -> None:

    given = settings(tmp_path)
    section, key, value = change
    if key is None:
        given[section] = value
    else:
        given[section][key] = value
    with pytest.raises(LoraDiffusionError, match=match):
        train(TrainConfig.parse(given))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_corrupt_picture_is_named_before_anything_starts(tmp_path: Path) -> None:
    given = config(tmp_path)
    (tmp_path / "pack" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(DataError, match=r"3\.png"):
        train(given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    given = settings(tmp_path)
    given["backbone"]["device"] = "cuda"

    with pytest.raises(ConfigError, match="cuda"):
        train(TrainConfig.parse(given))


def test_pictures_are_held_out_as_they_are_whatever_is_mirrored_or_watched(tmp_path: Path) -> None:
    plain, mirrored = config(tmp_path, steps=1), settings(tmp_path, steps=1)
    mirrored["data"]["flip"] = True
    mirrored |= {"output": str(tmp_path / "mirrored"), "watch": {"measure_every": 1}}
    assert train(TrainConfig.parse(mirrored)).bands_base == train(plain).bands_base


def test_a_compiled_denoiser_trains_the_same_to_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(len(inputs))  # what the compiler is given is run as it is: no C++ compiler is needed
        return graph.forward

    compiled = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(UNet2DConditionModel, "compile", compiled)
    plain = train(config(tmp_path, steps=2))
    made = train(TrainConfig.parse(settings(tmp_path, steps=2, compile=True) | {"output": str(tmp_path / "compiled")}))
    assert graphs
    assert made.backbone_unchanged
    assert made.losses == pytest.approx(plain.losses, rel=1e-4)
