"""The sweeps of `train_scripts/sweep.py` over a tiny base: what is run, what is equal, and that nothing runs twice."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from lora_diffusion import Adapter, ConfigError, TrainConfig, load_adapter
from lora_diffusion.families.skeletons import skeleton_of
from lora_diffusion.inspection.methods import count_parameters
from lora_diffusion.targets import find_targets
from tests.training.pictures import settings

SCRIPTS = Path(__file__).parents[2] / "train_scripts"


@pytest.fixture(scope="module", autouse=True)
def beside() -> Iterator[None]:
    """Scripts import those beside them."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def sweep() -> ModuleType:
    return importlib.import_module("sweep")


@pytest.fixture
def trials() -> ModuleType:
    return importlib.import_module("trials")


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
    words += ["--ranks", "1,3", "--methods", "ia3,locon,norm,tokens,pissa", "adapter.alpha=8"]
    sweep.main(words)
    said = capsys.readouterr().out
    assert "left out: method locon" not in said
    assert "left out" not in said
    rows = json.loads((out / "results.json").read_text())
    methods = ["ia3", "locon", "norm", "tokens", "pissa"]
    assert [row["name"] for row in rows] == ["1", "3", *methods]
    assert [row["sweep"] for row in rows] == ["rank"] * 2 + ["method"] * 5
    for row in rows[2:-1]:
        adapter = load_adapter(out / "trials" / f"method-{row['name']}" / f"method-{row['name']}.safetensors")
        numbers = sum(t.numel() for vectors in adapter.embeddings.values() for t in vectors.values())
        assert row["parameters"] == (numbers or _trained(adapter))
        assert bool(numbers) == (row["name"] == "tokens") != bool(len(adapter))
    for row in rows[:2]:
        adapter = load_adapter(out / "trials" / f"rank-{row['name']}" / f"rank-{row['name']}.safetensors")
        assert {layer.alpha / len(layer.tensors["down"]) for *_, layer in adapter} == {2.0}  # type: ignore[operator]
        assert adapter.parameters == row["parameters"]
    assert len({row["heldout_base"] for row in rows if row["name"] != "tokens"}) == 1
    assert all(row["heldout_adapter"] > 0 and row["file_bytes"] > 0 for row in rows)
    assert (out / "results.md").read_text().count("\n") == 9
    drawing = ElementTree.parse(out / "results.svg").getroot()
    assert len(drawing.findall("{http://www.w3.org/2000/svg}circle")) == 7

    def refuse(*_: object) -> None:
        raise AssertionError("a trial ran twice")

    monkeypatch.setattr(sweep, "train", refuse)
    sweep.main(words)
    assert json.loads((out / "results.json").read_text()) == rows
    with pytest.raises(ConfigError, match="other settings"):
        sweep.main([*words, "train.lr=0.5"])


def _trained(adapter: Adapter) -> int:
    """Numbers of an adapter that are no settings."""
    return sum(t.numel() for *_, layer in adapter for t in layer.tensors.values() if t.is_floating_point())


def test_what_cannot_be_trained_is_left_out_and_the_sweep_goes_on(
    sweep: ModuleType, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    words = [str(written), "--out", str(out), "--base", str(tmp_path / "base"), "--sweeps", "method", "--methods"]
    sweep.main([*words, "olora,lora", "adapter.rank=8", "adapter.targets=attention+ff+conv"])
    assert "left out: method olora: " in capsys.readouterr().out
    assert [row["name"] for row in json.loads((out / "results.json").read_text())] == ["lora"]


def test_methods_are_compared_at_equal_parameters(trials: ModuleType, tmp_path: Path) -> None:
    config = TrainConfig.parse(settings(tmp_path)).changed("adapter.rank=6", "adapter.alpha=3")
    model = skeleton_of(tmp_path / "base")["unet"]
    layers = list(find_targets(model, config.adapter.targets).values())
    wanted = count_parameters("lora", layers, 6)
    assert wanted is not None
    planned, left_out = trials.by_method(
        config, model, {}, ["lora", "dora", "loha", "adalora", "glora", "lora-fa", "tokens"]
    )
    found = {trial.name: trial for trial in planned}
    assert "adapter.rank=6" in found["lora"].settings
    assert "adapter.rank=3" in found["loha"].settings
    assert "adapter.alpha=1.5" in found["loha"].settings
    assert all(0.7 < trial.parameters / wanted < 1.35 for trial in planned)
    assert left_out == ["method tokens: the base has no text encoder"]


def test_target_sets_grow(trials: ModuleType, tmp_path: Path) -> None:
    config = TrainConfig.parse(settings(tmp_path))
    models = skeleton_of(tmp_path / "base")
    unet, encoders = models.pop("unet"), {"text_encoder": models["text_encoder"]}
    planned, left_out = trials.by_targets(config, unet, encoders)
    sets = ["attention-qv", "attention", "attention+ff", "attention+ff+conv"]
    assert [trial.name for trial in planned] == [*sets, "attention+ff+conv+text"]
    assert sorted({trial.parameters for trial in planned}) == [trial.parameters for trial in planned]
    assert config.changed(*planned[-1].settings).text.train == ["text_encoder"]
    assert not left_out
    assert len(trials.by_targets(config, unet, {})[0]) == 4


def test_a_sweep_that_there_is_not_is_an_error(sweep: ModuleType, trials: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sweep 'depth'"):
        trials.plan(TrainConfig.parse(settings(tmp_path)), ["depth"], [1])
    with pytest.raises(ConfigError, match="expected whole numbers"):
        sweep._numbers("1,x")


def test_the_published_table_and_plot_say_what_was_measured(sweep: ModuleType, tmp_path: Path) -> None:
    """`benchmarks/sweep.md` and `.svg` are what the script makes of `sweep.json`; rates are as the docs say."""
    published = SCRIPTS.parent / "benchmarks"
    results = []
    for row in json.loads((published / "sweep.json").read_text("utf-8")):
        own = {key: row.pop(key) for key in ("sweep", "name", "settings", "parameters", "lr")}
        own["settings"] = tuple(own["settings"])
        results.append(sweep.Result(sweep.Trial(**own), **row))
    sweep.write(results, tmp_path)
    for ending in ("json", "md", "svg"):
        assert (tmp_path / f"results.{ending}").read_text("utf-8") == (published / f"sweep.{ending}").read_text("utf-8")
    rates = {one.trial.name: one.trial.lr / 2e-3 for one in results if one.trial.sweep == "method"}
    others = {name: round(rate, 6) for name, rate in rates.items() if round(rate, 6) != 1}
    raised = dict.fromkeys(("adalora", "ia3", "vera", "norm", "tokens"), 5.0)
    assert others == {**raised, "prefix": 10.0, "full": 0.1}
    words = (SCRIPTS.parent / "docs" / "methods.md").read_text("utf-8")
    own_base = {one.trial.name: one.heldout_base for one in results if one.heldout_base != results[0].heldout_base}
    assert list(own_base) == ["tokens"]
    assert f"{own_base['tokens'] / results[0].heldout_base:.1%}".replace("%", " %") in words
