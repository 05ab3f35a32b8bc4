"""Settings: typed, named in errors, overridable."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_diffusion import ConfigError, TrainConfig

TOML = """
name = "x"
base = "b"
output = "o"
[data]
folder = "f"
"""


def load(tmp_path: Path, text: str = TOML, *changes: str) -> TrainConfig:
    path = tmp_path / "x.toml"
    path.write_text(text, "utf-8")
    return TrainConfig.load(path, changes)


def test_defaults_and_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, TOML, "train.steps=7", "adapter.targets=attention+ff", "train.lr=2e-4", 'name="y z"')
    assert (config.train.steps, config.adapter.targets, config.train.lr, config.name) == (
        7,
        "attention+ff",
        2e-4,
        "y z",
    )
    assert config.backbone.precision == "nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trian.steps=3", "unknown setting 'trian' (did you mean 'train'"),
        ("train.stepps=7", "unknown setting 'train.stepps' (did you mean 'train.steps'"),
        ("train.steps=0", "train.steps = 0: input should be greater than or equal to 1"),
        ("train.steps=many", "train.steps = 'many': input should be a valid integer"),
        ("backbone.precision=nf5", "backbone.precision = 'nf5'"),
        ("train.steps", "'train.steps' is no setting; expected key=value"),
        ("name.x=1", "'name' is a setting, not a section"),
        ("name=../x", "name = '../x'"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, TOML, change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        TrainConfig.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path, "name = ")
    with pytest.raises(ConfigError, match="'data' is missing"):
        load(tmp_path, 'name="x"\nbase="b"\noutput="o"')


@pytest.mark.parametrize("share", [-0.1, 0.9, 5])
def test_a_share_to_hold_out_that_leaves_too_little_is_refused(share: float) -> None:
    given = {"name": "x", "base": "b", "output": "o", "data": {"folder": "f", "heldout": share}}
    with pytest.raises(ConfigError, match=r"data\.heldout is .*expected a folder, or a share from 0 to 0\.5"):
        TrainConfig.parse(given)
