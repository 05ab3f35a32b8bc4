"""What a recipe sets, what wins over it, and that the page about it says the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion import ConfigError, TrainConfig, train
from lora_diffusion.training.objective import emphasised
from lora_diffusion.training.recipes import RECIPES, steps_for
from tests.training.pictures import settings

GIVEN: dict[str, Any] = {"name": "x", "base": "b", "output": "o", "data": {"folder": "f", "trigger": "sks"}}
CLASS = {"prior": {"subject": "dog"}}


def test_recipes_differ_and_what_is_said_wins_over_them() -> None:
    style = TrainConfig.parse(GIVEN | {"recipe": "style"})
    character = TrainConfig.parse(GIVEN | {"recipe": "character"} | CLASS)
    assert (style.adapter.targets, style.adapter.rank, style.data.flip) == ("attention+ff", 16, True)
    assert (character.adapter.targets, character.adapter.rank, character.data.flip) == ("attention", 8, False)
    said = TrainConfig.parse(GIVEN | CLASS | {"recipe": "character", "adapter": {"rank": 32}, "train": {"steps": 9}})
    assert (said.adapter.rank, said.adapter.targets) == (32, "attention")
    assert (said.train.steps, said.train.exposures) == (9, None)
    assert TrainConfig.parse(GIVEN).train.exposures is None


def test_a_recipe_holds_through_a_change_and_a_character_needs_a_word() -> None:
    style = TrainConfig.parse(GIVEN | {"recipe": "style"})
    assert style.changed("train.batch=1").model_dump() == {
        **style.model_dump(),
        "train": {**style.train.model_dump(), "batch": 1},
    }
    with pytest.raises(ConfigError, match=r"recipe 'character' needs data\.trigger"):
        TrainConfig.parse(GIVEN | {"recipe": "character", "data": {"folder": "f"}})
    with pytest.raises(ConfigError, match=r"prior\.subject, what it is one of"):
        TrainConfig.parse(GIVEN | {"recipe": "character"})
    with pytest.raises(ConfigError, match="recipe = 'stile'"):
        TrainConfig.parse(GIVEN | {"recipe": "stile"})


def test_steps_follow_the_pictures_up_to_a_limit(tmp_path: Path) -> None:
    assert steps_for(3000, 100, 20, 4) == 500
    assert steps_for(3000, 100, 900, 4) == 3000
    assert steps_for(3000, 1, 0.5, 4) == 1
    assert steps_for(800, None, 20, 4) == 800
    given = settings(tmp_path, exposures=3, batch=2, steps=50)  # 4 of 6 pictures are trained on
    assert train(TrainConfig.parse(given)).steps == 6


@pytest.mark.parametrize("emphasis", [1.0, 0.5, -0.5, -1.0])
def test_emphasis_moves_noise_levels_as_its_distribution_says(emphasis: float) -> None:
    even = (torch.arange(10_000) + 0.5) / 10_000
    moved = emphasised(even, emphasis)
    assert bool(((moved >= 0) & (moved <= 1)).all())
    # the mean of u³ is 1/4, of u 1/2
    towards = 0.25 if emphasis > 0 else 0.75
    expected = (1 - abs(emphasis)) * 0.5 + abs(emphasis) * towards
    assert moved.mean().item() == pytest.approx(expected, abs=1e-3)
    assert torch.equal(emphasised(even, 0.0), even)


def test_the_page_says_what_the_recipes_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    for column, recipe in enumerate(("style", "character")):
        for section, values in RECIPES[recipe].items():
            for key, value in values.items():
                row = re.search(rf"^\| `{section}\.{key}` \|(.*)$", page, re.MULTILINE)
                assert row, f"no row for {section}.{key}"
                said = row[1].split("|")[column].strip()
                assert said == str(value).lower(), f"{recipe} {section}.{key}: the page says {said}"
