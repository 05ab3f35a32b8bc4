"""A new run that begins where a file ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion import LoraDiffusionError, TrainConfig, load_adapter, save_adapter, train
from lora_diffusion.training.checkpoints import check_settings
from lora_diffusion.training.config import default_settings
from lora_diffusion.training.results import Progress
from tests.training.pictures import config, cut_off, settings


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps."""
    root = tmp_path_factory.mktemp("first")
    train(config(root, steps=2))
    return root


def again(root: Path, path: Path, **adapter: Any) -> dict[str, Any]:
    given = settings(root, steps=1, lr=1e-12)
    given["adapter"] |= {"init_from": str(path)} | adapter
    return given | {"output": str(root / "again")}


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_it_begins_with_the_file_in_any_spelling(first: Path, tmp_path: Path, spelling: str) -> None:
    old = load_adapter(first / "out" / "blocks.safetensors")
    path = tmp_path / "old.safetensors"
    save_adapter(old, path, format=spelling)
    given = again(first, path) | {"output": str(tmp_path / "out")}
    result = train(TrainConfig.parse(given))
    assert result.adapter is not None
    new = load_adapter(result.adapter)
    for component, name, layer in old:
        for key, tensor in layer.tensors.items():
            torch.testing.assert_close(new.layers[component][name].tensors[key], tensor, rtol=0, atol=1e-9)
    told = json.loads(new.metadata["lora_diffusion"])
    assert told["continues_sha256"] == load_adapter(path).content_hash
    assert str(tmp_path) not in json.dumps(new.metadata)


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ({"rank": 8}, r"is lora of rank 4 with alpha 4, and this run trains lora of rank 8 with alpha 8"),
        ({"alpha": 1.0}, r"with alpha 4, and this run trains lora of rank 4 with alpha 1"),
        ({"targets": "attention"}, r"differ in unet"),
        ({"init": "pissa"}, r"adapter\.init = 'pissa'"),
        ({"method": "loha"}, r"this run trains loha"),
    ],
    ids=str,
)
def test_a_file_that_is_not_of_this_run_is_refused(first: Path, adapter: dict[str, Any], match: str) -> None:
    given = again(first, first / "out" / "blocks.safetensors", **adapter)
    with pytest.raises(LoraDiffusionError, match=match):
        train(TrainConfig.parse(given))
    assert not list((first / "again").glob("*.safetensors"))


def test_resuming_with_another_file_is_refused(first: Path, tmp_path: Path) -> None:
    old = load_adapter(first / "out" / "blocks.safetensors")
    given = again(first, first / "out" / "blocks.safetensors") | {"output": str(tmp_path / "out")}
    train(TrainConfig.parse(given))
    for layer in old.layers["unet"].values():
        layer.tensors["up"].mul_(2)
    save_adapter(old, tmp_path / "other.safetensors")
    given["adapter"]["init_from"] = str(tmp_path / "other.safetensors")
    with pytest.raises(LoraDiffusionError, match="start: "):
        train(TrainConfig.parse(given))


def test_a_checkpoint_from_before_a_setting_goes_on(tmp_path: Path) -> None:
    """Settings and sections that are new since have their defaults in it."""
    given = TrainConfig.parse(settings(tmp_path))

    def stop(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(given, stop)
    run = tmp_path / "out" / "checkpoints" / "step-000002" / "run.json"
    told = json.loads(run.read_text())
    del told["settings"]["times"], told["settings"]["train"]["optimizer"], told["settings"]["start"]
    run.write_text(json.dumps(told))
    assert train(given).steps == 6
    now = default_settings()
    now["train"]["optimizer"] = "adafactor"
    with pytest.raises(LoraDiffusionError, match=r"train\.optimizer: 'adamw' -> 'adafactor'"):
        check_settings({}, now, frozenset(), tmp_path, default_settings())


@pytest.mark.parametrize("base", ["sd", "flux"])
def test_what_is_made_again_in_backward_may_change_on_the_way_and_changes_no_byte(tmp_path: Path, base: str) -> None:
    given = config(tmp_path, base, steps=4)
    whole = train(given).adapter
    halves = given.changed(f"output={tmp_path / 'halves'}", "train.recompute=false")
    cut_off(halves, 3)
    said: list[str] = []
    second = train(halves.changed("train.recompute=true"), lambda step: said.append(step.said)).adapter
    assert "goes on from step-000002; changed since: train.recompute: False -> True" in said
    assert whole is not None
    assert second is not None
    assert load_adapter(second) == load_adapter(whole)
