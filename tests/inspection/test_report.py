"""The verdict on a run, and the one file that tells of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_diffusion import Adapter, ConfigError, LayerAdapter, TrainConfig, TrainResult, load_adapter, train
from lora_diffusion.inspection.charts import lines, smoothed
from lora_diffusion.inspection.doctor import dead_layers, diagnose, relative_norm
from lora_diffusion.inspection.report import write_report
from lora_diffusion.inspection.spectra import all_values
from tests.training.pictures import settings


def adapter(strength: float = 1.0, *, alpha: float = 2.0, dead: bool = False) -> Adapter:
    """Six layers of rank 2 with ‖ΔW‖ = `strength`; the last adds nothing if `dead`."""
    layers: dict[str, LayerAdapter] = {}
    for number in range(6):
        up, down = torch.zeros(4, 2), torch.zeros(2, 3)
        up[0, 0], down[0, 0] = 0.0 if dead and number == 5 else strength * 2.0 / alpha, 1.0
        layers[f"down_blocks.{number}.to_q"] = LayerAdapter("lora", {"down": down, "up": up}, alpha)
    return Adapter("a", {"unet": layers})


def result(before: float, after: float, measured: list[tuple[int, float]] | None = None) -> TrainResult:
    weights = {"unet": {f"down_blocks.{number}.to_q": 50.0 for number in range(6)}}
    return TrainResult(None, 9, 1.0, [1.0], before, after, measured=measured or [], weights=weights)


@pytest.mark.parametrize(
    ("found", "made", "word", "said"),
    [
        (result(1.0, 0.9), adapter(), "good", "1.0000 → 0.9000"),
        (result(1.0, 0.9), adapter(dead=True), "good", "1 of 6 layers are dead"),
        (result(1.0, 0.99, [(3, 0.8), (6, 0.9)]), adapter(), "overfitted", "0.8000 at step 3"),
        (result(1.0, 1.2), adapter(), "overfitted", "the base does better"),
        (result(1.0, 1.0), adapter(1e-3), "not learned", "more steps or a higher train.lr"),
        (result(1.0, 1.0), adapter(1e-3, alpha=0.2), "not learned", "alpha / rank is 0.1"),
        (result(1.0, 1.0), adapter(), "not learned", "captions or pictures"),
        (result(math.nan, math.nan), adapter(), "unknown", "data.heldout"),
    ],
)
def test_the_verdict_follows_from_losses_and_strength(found: TrainResult, made: Adapter, word: str, said: str) -> None:
    verdict = diagnose(found, made)
    assert verdict.word == word
    assert said in str(verdict)


def test_the_relative_norm_is_that_of_the_dense_deltas_in_any_spelling() -> None:
    made = adapter(3.0)
    weights = result(1, 1).weights
    assert relative_norm(weights, all_values(made)) == pytest.approx(3.0 / 50.0)
    flattened = {name.replace(".", "_"): layer for name, layer in made.layers["unet"].items()}
    assert relative_norm(weights, all_values(Adapter("a", {"unet": flattened}))) == pytest.approx(3.0 / 50.0)
    assert dead_layers(all_values(adapter(dead=True))) == ["unet.down_blocks.5.to_q"]


def test_what_a_run_found_is_read_back_whole_and_half_of_it_is_refused(tmp_path: Path) -> None:
    found = replace(result(1.0, math.nan, [(3, 0.5)]), adapter=tmp_path / "a.safetensors", precision="nf4")
    found.write(tmp_path)
    again = TrainResult.read(tmp_path)
    assert math.isnan(again.heldout_adapter)
    assert replace(again, heldout_adapter=0.0) == replace(found, heldout_adapter=0.0)
    assert again.heldout == "not measured: nothing is held out"
    (tmp_path / "result.json").write_text((tmp_path / "result.json").read_text()[:-9])
    with pytest.raises(ConfigError, match=r"result\.json is not whole"):
        TrainResult.read(tmp_path)


def test_charts_keep_inside_and_leave_out_what_is_no_number() -> None:
    drawn = lines([("a <b>", [(1, 0.5), (2, math.nan), (3, 1.5)]), ("none", [])], "steps")
    (path,) = re.findall(r'<polyline points="([^"]+)"', drawn)
    points = [tuple(map(float, point.split(","))) for point in path.split()]
    assert points == [(62.0, 194.0), (632.0, 20.0)]
    assert "a &lt;b&gt;" in drawn
    assert ">none<" not in drawn
    assert smoothed([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert lines([], "steps") == "<p>nothing was measured</p>"


def test_a_watched_run_ends_with_the_same_adapter_and_one_file_that_shows_it_all(tmp_path: Path) -> None:
    plain = train(TrainConfig.parse(settings(tmp_path, steps=4)))
    watch: dict[str, Any] = {"prompts": ["thing <1>", "thing 2"], "every": 2, "pictures": 2, "steps": 1}
    watch |= {"measure_every": 2, "weights": [0.0, 1.0]}
    config = TrainConfig.parse(settings(tmp_path, steps=4) | {"watch": watch, "output": str(tmp_path / "watched")})
    found = train(config)
    assert plain.adapter is not None
    assert found.adapter is not None
    assert load_adapter(plain.adapter) == load_adapter(found.adapter)
    assert found.losses == plain.losses
    assert [path.name for path in found.previews] == ["step-000002.png", "step-000004.png", "weights.png"]
    assert all(Image.open(path).width > 256 for path in found.previews)
    assert [step for step, _ in found.measured] == [2, 4]
    assert found.measured[-1][1] == found.heldout_adapter
    best = load_adapter(found.adapter.with_name("blocks-best.safetensors"))
    assert (best == load_adapter(found.adapter)) == (found.best == found.measured[-1])
    assert all(norm > 0 for norms in found.weights.values() for norm in norms.values())
    path, verdict = write_report(config, found)
    text = path.read_text("utf-8")
    assert text.count("data:image/png;base64,") == 3
    assert f'<p class="word">{verdict.word}</p>' in text
    assert "thing &lt;1&gt;" in text
    assert "<polyline" in text
    assert "down_blocks.1" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_what_cannot_be_watched_or_reported_is_refused(tmp_path: Path) -> None:
    given = settings(tmp_path)
    with pytest.raises(ConfigError, match=r"watch\.every draws watch\.prompts"):
        TrainConfig.parse(given | {"watch": {"every": 2}})
    given["data"]["heldout"] = 0.0
    with pytest.raises(ConfigError, match=r"watch\.measure_every measures on held-out pictures"):
        train(TrainConfig.parse(given | {"watch": {"measure_every": 1}}))
    with pytest.raises(ConfigError, match="is not finished"):
        write_report(TrainConfig.parse(given), TrainResult(None, 1, 1.0, []))
