"""The sweeps of `train_scripts/sweep.py` over a tiny base: what is run, what is equal, and that nothing runs twice."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from lora_diffusion import ConfigError, TrainConfig, load_adapter
from lora_diffusion.families.skeletons import skeleton_of
from lora_diffusion.inspection.methods import count_parameters
from lora_diffusion.targets import find_targets
from tests.training.pictures import settings

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "sweep.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A configuration on disk, of two steps; its base is to be given."""
    given = settings(tmp_path, steps=2)
    lines = [f'name = "x"\nbase = "nowhere"\noutput = "{tmp_path / "unused"}"']
    for section in ("data", "adapter", "backbone", "train"):
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in given[section].items())]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    assert tomllib.loads((tmp_path / "run.toml").read_text())["train"]["steps"] == 2
    return tmp_path / "run.toml"


def test_trials_are_run_once_compared_and_drawn(
    sweep: ModuleType,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "sweep"
    words = [str(written), "--out", str(out), "--base", str(tmp_path / "base"), "--sweeps", "rank,method"]
    words += ["--ranks", "1,3", "--methods", "ia3,norm", "adapter.alpha=8"]
    sweep.main(words)
    said = capsys.readouterr().out
    assert "left out: method norm" in said
    rows = json.loads((out / "results.json").read_text())
    assert [(row["sweep"], row["name"]) for row in rows] == [("rank", "1"), ("rank", "3"), ("method", "ia3")]
    for row in rows[:2]:
        adapter = load_adapter(out / "trials" / f"rank-{row['name']}" / f"rank-{row['name']}.safetensors")
        assert {layer.alpha / len(layer.tensors["down"]) for *_, layer in adapter} == {2.0}  # type: ignore[operator]
        assert adapter.parameters == row["parameters"]
    assert len({row["heldout_base"] for row in rows}) == 1
    assert all(row["heldout_adapter"] > 0 and row["file_bytes"] > 0 for row in rows)
    assert (out / "results.md").read_text().count("\n") == 5
    drawing = ElementTree.parse(out / "results.svg").getroot()
    assert len(drawing.findall("{http://www.w3.org/2000/svg}circle")) == 3

    def refuse(*_: object) -> None:
        raise AssertionError("a trial ran twice")

    monkeypatch.setattr(sweep, "train", refuse)
    sweep.main(words)
    assert json.loads((out / "results.json").read_text()) == rows
    with pytest.raises(ConfigError, match="other settings"):
        sweep.main([*words, "train.lr=0.5"])


def test_methods_are_compared_at_equal_parameters(sweep: ModuleType, tmp_path: Path) -> None:
    config = TrainConfig.parse(settings(tmp_path)).changed("adapter.rank=6", "adapter.alpha=3")
    model = skeleton_of(tmp_path / "base")["unet"]
    layers = list(find_targets(model, config.adapter.targets).values())
    wanted = count_parameters("lora", layers, 6)
    assert wanted is not None
    trials, left_out = sweep.by_method(config, model, ["lora", "dora", "loha", "adalora", "glora", "ia3", "locon"])
    found = {trial.name: trial for trial in trials}
    assert "adapter.rank=6" in found["lora"].settings
    assert "adapter.rank=3" in found["loha"].settings
    assert "adapter.alpha=1.5" in found["loha"].settings
    assert all(0.7 < found[name].parameters / wanted < 1.35 for name in found if name != "ia3")
    assert left_out == ["method locon, which is not defined on all of attention+ff"]


def test_target_sets_grow(sweep: ModuleType, tmp_path: Path) -> None:
    trials = sweep.by_targets(TrainConfig.parse(settings(tmp_path)), skeleton_of_base(tmp_path))
    assert [trial.name for trial in trials] == ["attention-qv", "attention", "attention+ff", "attention+ff+conv"]
    assert sorted(trial.parameters for trial in trials) == [trial.parameters for trial in trials]


def skeleton_of_base(root: Path) -> object:
    return skeleton_of(root / "base")["unet"]


def test_a_sweep_that_there_is_not_is_an_error(sweep: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sweep 'depth'"):
        sweep.plan(TrainConfig.parse(settings(tmp_path)), ["depth"], [1])
    with pytest.raises(ConfigError, match="expected whole numbers"):
        sweep._numbers("1,x")
