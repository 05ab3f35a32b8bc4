"""Prompt syntax, libraries, recipes that make the same pixels, grids; through the command line where there is one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lora_diffusion import AdapterStack, missing_triggers, save_adapter
from lora_diffusion.axes import Choices, grid_order, parse_factors
from lora_diffusion.cli import application
from lora_diffusion.cli.bake import bake
from lora_diffusion.cli.conflicts import conflicts
from lora_diffusion.cli.extract import extract
from lora_diffusion.cli.generate import generate
from lora_diffusion.cli.grid import grid
from lora_diffusion.cli.merge import merge
from lora_diffusion.cli.resize import resize
from lora_diffusion.composing import Composition
from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.generating import RECIPE, read_recipe
from lora_diffusion.library import Library, by_image, parse_prompt, parse_prompts
from tests.test_gates import adapter

COMMANDS = (generate, grid, merge, resize, extract, bake, conflicts)


def run(*words: object, fails: type[Exception] | None = None) -> str:
    done = CliRunner().invoke(application(*COMMANDS), [str(word) for word in words])
    if fails is None:
        assert done.exit_code == 0, (done.output, done.exception)
    else:
        assert isinstance(done.exception, fails), (done.output, done.exception)
    return done.output if fails is None else str(done.exception)


@pytest.fixture
def shelf(sd: Any, tmp_path: Path) -> Path:
    """A folder with a base model and a library of three adapters, two of one name."""
    sd.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("ink", "styles/kiki", "people/kiki")):
        path = tmp_path / "loras" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(adapter(sd, path.stem, seed), path)
    return tmp_path


def test_tags_leave_the_prompt() -> None:
    assert parse_prompt("a fox  <lora:ink:0.8> runs") == ("a fox runs", {"ink": 0.8})
    assert parse_prompt("<lora:a/b:te=0.5:unet=0@0,1@0.5><lora:c>") == (
        "",
        {"a/b": {"te": 0.5, "unet": "0@0,1@0.5"}, "c": 1.0},
    )
    assert parse_prompt("no  tag <b>") == ("no  tag <b>", {})
    texts, mixes = parse_prompts(["x <lora:a:0.5>", "y <lora:b>", "z <lora:a:0.5>"])
    assert (texts, mixes) == (["x", "y", "z"], {"a": [0.5, 0.0, 0.5], "b": [0.0, 1.0, 0.0]})
    assert by_image({"a": [1, 1], "b": [0, 1]}) == {"a": 1, "b": [0, 1]}
    for bad in ("<lora:>", "<lora:a><lora:a:2>", "<lora:a:x>", "<lora:a:inf>"):
        with pytest.raises(ConfigError):
            parse_prompt(bad)


def test_a_name_is_found_in_the_library_alone(shelf: Path) -> None:
    library = Library(shelf / "loras")
    save_adapter(*_copy(library.find("ink")), shelf / "secret.safetensors")
    (shelf / "loras" / "link.safetensors").symlink_to(shelf / "secret.safetensors")
    assert library.find("styles/kiki") == shelf / "loras" / "styles" / "kiki.safetensors"
    with pytest.raises(TargetError, match="'people/kiki', 'styles/kiki'"):
        library.find("kiki")
    with pytest.raises(TargetError, match="did you mean 'ink'"):
        library.find("inc")
    for outside in ("../secret", str(shelf / "secret"), "link", "styles/../ink"):
        with pytest.raises(TargetError):
            Library(shelf / "loras").find(outside)
    with pytest.raises(ConfigError, match="no folder"):
        Library(shelf / "none").find("ink")


def _copy(path: Path) -> tuple[Any]:
    from lora_diffusion import load_adapter

    return (load_adapter(path),)


def test_generate_from_a_picture_makes_the_same_pixels(shelf: Path) -> None:
    few = ["-b", shelf / "base", "--steps", 2, "--size", "32x32"]
    mode = ["--compose", "composite", "--every", 3, "--balance"]
    prompts = ["a fox <lora:ink:0.8>", "a cat <lora:styles/kiki:te=0.5:unet=0@0,1@1>"]
    ink = shelf / "loras" / "people" / "kiki.safetensors"
    run("generate", *prompts, "-a", f"{ink}:-0.3", "-l", shelf / "loras", "-o", shelf / "x.png", *few, *mode)
    drawn = shelf / "x-2.png"
    made = read_recipe(drawn)
    assert made.order.prompts == ["a fox", "a cat"]
    assert made.composition == Composition("composite", 3, balance=True)
    assert made.order.weights["styles/kiki"] == [0.0, {"te": 0.5, "unet": "0@0,1@1"}]
    (shelf / "loras" / "people" / "kiki.safetensors").rename(shelf / "loras" / "moved.safetensors")
    run("generate", "--from", drawn, "-l", shelf / "loras", "-o", shelf / "again.png")
    pixels = [np.asarray(Image.open(shelf / name)) for name in ("x-2.png", "again.png", "x.png")]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    recipes = [json.loads(Image.open(shelf / name).text[RECIPE]) for name in ("x-2.png", "again.png")]
    assert recipes[0]["prompt"] == recipes[1]["prompt"] == "a cat"
    (shelf / "loras" / "moved.safetensors").unlink()
    assert "has its content" in run("generate", "--from", drawn, "-o", shelf / "no.png", fails=ConfigError)
    Image.new("RGB", (8, 8)).save(shelf / "plain.png")
    assert "no recipe" in run("generate", "--from", shelf / "plain.png", "-o", shelf / "no.png", fails=ConfigError)


def test_a_trigger_word_that_no_prompt_has_is_named(sd: Any, shelf: Path) -> None:
    told = {"modelspec.trigger_phrase": "ink, brush drawing"}
    with AdapterStack(sd) as stack:
        stack.add(replace(adapter(sd, "ink"), metadata=told))
        stack.add(replace(adapter(sd, "kiki"), embeddings={"<kiki>": {"text_encoder": torch.zeros(1, 32)}}))
        stack.add(adapter(sd, "plain"))
        assert missing_triggers(stack, "pink apple") == {"ink": ["ink", "brush drawing"], "kiki": ["<kiki>"]}
        assert missing_triggers(stack, ["<kiki> eats", "a Brush drawing"]) == {}
    save_adapter(replace(adapter(sd, "told"), metadata=told), shelf / "told.safetensors")
    words = ("-b", shelf / "base", "-a", shelf / "told.safetensors", "--steps", 1, "--size", "32x32", "--overwrite")
    said = "told: trained with ink, brush drawing, which no prompt mentions"
    assert said in run("generate", "pink apple", *words, "-o", shelf / "x.png")
    assert said not in run("generate", "an INK apple", *words, "-o", shelf / "x.png")


def test_grid_over_its_axes(shelf: Path) -> None:
    choices = Choices(["p"], [3, 4], {"a": 0.5, "b": {"unet": 2.0}}, parse_factors("0;2;0@0,1@1"))
    order = grid_order(choices, "weight", "seed")
    assert order.seeds == [3, 3, 3, 4, 4, 4]
    assert order.weights["a"][:3] == [0.0, 1.0, "0.0@0.0,0.5@1.0"]
    assert order.weights["b"][1] == {"unet": 4.0}
    assert grid_order(choices, "adapter", "seed").weights == {
        "a": [0.5, 0, 0.5, 0],
        "b": [0, {"unet": 2}, 0, {"unet": 2}],
    }
    assert choices.labels("weight") == ["base", "x 2", "0@0,1@1"]
    with pytest.raises(ConfigError, match="two different"):
        grid_order(choices, "seed", "seed")
    ink = shelf / "loras" / "ink.safetensors"
    few = ["-b", shelf / "base", "--steps", 1, "--size", "32x32", "-o", shelf / "grid.png"]
    run("grid", "x", "-a", f"{ink}:0.8", "--rows", "seed", "--seeds", "0,1", "--weights", "0,1", *few)
    assert Image.open(shelf / "grid.png").width > 2 * 128


def test_files_from_blends_at_the_terminal(shelf: Path) -> None:
    ink, kiki = shelf / "loras" / "ink.safetensors", shelf / "loras" / "styles" / "kiki.safetensors"
    both = shelf / "both.safetensors"
    assert "100.00%" in run("merge", f"{ink}:0.5", f"{kiki}:unet=-1:te2=0", "-o", both)  # it has no te2
    assert ": rank 1, " in run("resize", both, "--rank", 1, "-o", shelf / "small.safetensors")
    run("bake", both, "-b", shelf / "base", "-o", shelf / "baked")
    run("extract", shelf / "baked", shelf / "base", "--rank", 4, "-o", shelf / "out.safetensors")
    assert "weights" in run("conflicts", ink, kiki, "--picture", shelf / "map.png")
    assert Image.open(shelf / "map.png").height > 6 * 30
    run("conflicts", ink, kiki, "--picture", shelf / "map.png", fails=ConfigError)
    run("resize", both, "--rank", 1, "-o", both, fails=ConfigError)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_help_shows_an_example(command: Any) -> None:
    assert "Example:" in run(command.__name__, "--help")


def test_adapters_without_a_layer_in_common_have_no_conflict_and_no_picture(sd: Any, tmp_path: Path) -> None:
    for name, component in (("a", "unet"), ("b", "text_encoder")):
        save_adapter(adapter(sd, name, components=(component,)), tmp_path / f"{name}.safetensors")
    files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "no layer in common" in run("conflicts", *files, "--picture", tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()
