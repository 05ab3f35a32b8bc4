"""What a configuration says of ranks, starts and dropout reaches the slots, and a wrong one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lora_diffusion import TrainConfig, load_adapter, train
from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.lora import slot_of
from lora_diffusion.training.adapting import attach_for
from tests.training.pictures import settings


def trained(root: Path, **adapter: Any) -> Path:
    given = settings(root, steps=2)
    given["adapter"] |= {"targets": "attention", **adapter}
    result = train(TrainConfig.parse(given))
    assert result.backbone_unchanged
    assert result.adapter is not None
    return result.adapter


@pytest.mark.parametrize("init", ["pissa", "loftq", "eva"])
def test_a_start_over_nf4_is_written_as_a_plain_lora(tmp_path: Path, init: str) -> None:
    ranks = {"mid_block.*": 3}
    dropout = {"rank_dropout": 0.2, "module_dropout": 0.2, "nested": True}
    found = load_adapter(trained(tmp_path, init=init, ranks=ranks, **dropout))
    assert found.methods == {"lora"}
    assert found.spelling == "diffusers"
    times = 1 if init == "eva" else 2
    for name, layer in found.layers["unet"].items():
        rank = 3 if name.startswith("mid_block") else 4
        assert layer.tensors["down"].shape[0] in (rank * times, rank)  # what stayed in 16 bits has no LoftQ start
    assert json.loads(found.metadata["lora_diffusion"])["settings"]["adapter"]["init"] == init


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "loha", "max_norm": 1.0}, "max_norm is for pairs"),
        ({"init": "pissa", "max_norm": 1.0}, "max_norm is for pairs"),
        ({"method": "dora", "init": "loftq"}, "'loftq' is a start of method 'lora'"),
        ({"method": "dora", "freeze_down": True}, "no setting 'freeze_down'"),
    ],
)
def test_settings_without_sense_are_named_and_leave_no_slot(adapter: dict[str, Any], said: str) -> None:
    model = nn.ModuleDict({"to_q": nn.Linear(8, 8)})
    given = {"name": "a", "base": "nowhere", "output": "out", "data": {"folder": "pack"}}
    with pytest.raises(ConfigError, match=said):
        attach_for(TrainConfig.parse({**given, "adapter": {"rank": 2, **adapter}}), model, "unet", lambda: None)
    assert slot_of(model["to_q"]) is None


def test_a_capped_and_half_frozen_pair_trains(tmp_path: Path) -> None:
    found = load_adapter(trained(tmp_path, freeze_down=True, max_norm=1e-3))
    products = [
        layer.tensors["up"].flatten(1) @ layer.tensors["down"].flatten(1) for layer in found.layers["unet"].values()
    ]
    assert 0 < max(product.norm().item() for product in products) < 1.001e-3


def test_targets_that_match_nothing_are_found_before_pictures_are_encoded(tmp_path: Path) -> None:
    given = settings(tmp_path)
    given["adapter"]["targets"] = "nothing.*"
    heard: list[str] = []
    with pytest.raises(TargetError, match="nothing"):
        train(TrainConfig.parse(given), lambda progress: heard.append(progress.stage))
    assert heard == []
