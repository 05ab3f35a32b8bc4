"""What TensorBoard reads of a run: every step once, also of one that was cut off and went on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_diffusion import ConfigError, TrainConfig, train
from tests.training.pictures import cut_off, settings


def test_a_run_that_was_cut_off_has_every_point_once_and_the_bytes_of_one_that_says_nothing(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    silent = train(TrainConfig.parse(settings(tmp_path, steps=4)))
    watch = {"tensorboard": True, "measure_every": 2, "prompts": ["thing 1"], "every": 2, "pictures": 1, "steps": 1}
    config = TrainConfig.parse(settings(tmp_path, steps=4) | {"watch": watch, "output": str(tmp_path / "told")})
    cut_off(config, at=3)  # step 2 is in a checkpoint, step 3 in none
    result = train(config)
    assert silent.adapter is not None
    assert result.adapter is not None
    assert result.adapter.read_bytes() == silent.adapter.read_bytes()
    board = reading.EventAccumulator(str(tmp_path / "told" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(board.Tags()["scalars"]) == {"loss/training", "loss/heldout", "rate", "gradient norm"}
    points = {name: [(point.step, point.value) for point in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert points["loss/training"] == [(n, pytest.approx(loss)) for n, loss in enumerate(silent.losses, 1)]
    assert points["loss/heldout"] == [(step, pytest.approx(loss)) for step, loss in result.measured]
    assert [step for step, _ in points["rate"]] == [1, 2, 3, 4]
    assert all(norm > 0 for _, norm in points["gradient norm"])
    assert [picture.step for picture in board.Images("previews/step")] == [2, 4]
    assert [picture.step for picture in board.Images("previews/weights")] == [4]
    train(config)  # a finished run adds nothing
    assert len(board.Reload().Scalars("loss/training")) == 4


def test_without_tensorboard_it_is_said_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    given = settings(tmp_path) | {"base": "nowhere/at/all", "watch": {"tensorboard": True}}
    with pytest.raises(ConfigError, match=r"watch\.tensorboard needs tensorboard, .*'lora-diffusion\[tensorboard\]'"):
        train(TrainConfig.parse(given))
