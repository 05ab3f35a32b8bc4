"""The command line as a person meets it: what it writes, what it says, and one sentence with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_diffusion import AdapterStack, LoRA, attach, save_adapter
from lora_diffusion.cli import main
from lora_diffusion.cli.options import adapter_names
from lora_diffusion.errors import ConfigError
from lora_diffusion.generating import RECIPE
from tests import tiny
from tests.training.pictures import settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline on disk with an adapter `style.safetensors` beside it."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny.sd()
    pipe.save_pretrained(folder / "base")
    with attach(pipe.unet, LoRA(2), "attention+conv") as attachment:
        for parameter in attachment.parameters():
            parameter.data.normal_(std=0.2)
        save_adapter(attachment.adapter("style"), folder / "style.safetensors")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Exit code of `lora-diffusion WORDS`."""
    monkeypatch.setattr(sys, "argv", ["lora-diffusion", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def toml(path: Path, given: dict[str, object]) -> Path:
    """Write nested settings as TOML."""
    flat = [f"{key} = {json.dumps(value)}" for key, value in given.items() if not isinstance(value, dict)]
    for section, values in given.items():
        if isinstance(values, dict):
            flat += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(flat), "utf-8")
    return path


def test_help_is_quick_to_import_and_shows_every_command() -> None:
    code = "import sys; from lora_diffusion.cli import main; sys.argv = ['x', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('HEAVY', sorted({'torch', 'diffusers', 'transformers', 'peft'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in shown
    assert all(command in shown for command in ("quickstart", "train", "doctor", "generate", "grid"))


@pytest.mark.parametrize("command", ["quickstart", "train", "doctor", "generate", "grid"])
def test_every_command_has_help_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert "Example: lora-diffusion" in " ".join(capsys.readouterr().out.split())


def test_train_then_the_same_command_again_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toml(tmp_path / "blocks.toml", settings(tmp_path))
    assert run(monkeypatch, "train", config, "train.steps=3") == 0
    said = capsys.readouterr().out
    assert "no byte of the backbone changed" in said
    written = (tmp_path / "out" / "blocks.safetensors").read_bytes()
    assert run(monkeypatch, "train", config, "train.steps=3") == 0
    assert (tmp_path / "out" / "blocks.safetensors").read_bytes() == written
    verdict = next(line for line in said.splitlines() if ": held-out loss" in line)
    capsys.readouterr()
    for place in (config, tmp_path / "out"):  # the doctor says of it what was said at its end
        assert run(monkeypatch, "doctor", place) == (0 if verdict.startswith("good") else 1)
        shown = capsys.readouterr().out
        assert verdict in shown.splitlines()
        assert "nf4, no byte changed" in shown
    (tmp_path / "out" / "result.json").unlink()
    assert run(monkeypatch, "doctor", tmp_path / "out") == 2
    assert "there is no finished run" in capsys.readouterr().err


def test_generate_writes_the_stack_s_picture_with_its_recipe(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "picture.png"
    style = base / "style.safetensors"
    words = ["generate", "a red fox", "-b", base / "base", "-a", f"{style}:0.7", "-o", out, "--steps", "2"]
    words += ["--size", "32x32", "--seed", "5"]
    assert run(monkeypatch, *words) == 0
    with Image.open(out) as picture:
        made = json.loads(picture.text[RECIPE])
        drawn = picture.convert("RGB").copy()
    assert (made["prompt"], made["seed"], made["adapters"][0]["weight"]) == ("a red fox", 5, 0.7)

    from lora_diffusion.generating import Drawing, draw
    from lora_diffusion.pipelines import load_for_drawing

    pipe = load_for_drawing(base / "base", None, "cpu").pipe
    with AdapterStack(pipe) as stack:
        stack.add(style, 0.7)
        (expected,) = draw(pipe, ["a red fox"], [5], Drawing(2, None, (32, 32)))
    assert drawn.tobytes() == expected.tobytes()
    assert run(monkeypatch, *words) == 2  # exists already


def test_grid_writes_a_labelled_sheet(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "grid.png"
    words = ["grid", "a fox", "a hen", "-b", base / "base", "-a", base / "style.safetensors", "--weights", "0,1"]
    assert run(monkeypatch, *words, "-o", out, "--steps", "1", "--size", "32x32") == 0
    with Image.open(out) as sheet:
        assert sheet.width > 2 * 128
        assert sheet.height > 2 * 128


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "none.toml"], "no configuration file none.toml"),
        (["generate", "x", "-b", "nowhere/at/all"], "no Diffusers folder"),
        (["generate", "x", "-a", "none.safetensors:0.5"], "'none.safetensors' is not there"),
        (["generate", "x", "--size", "64"], "expected WIDTHxHEIGHT"),
        (["grid", "x", "--weights", "0;1"], "expected numbers with commas"),
        (["quickstart", "--samples", "nowhere"], "no samples in nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_a_file_that_is_no_adapter_is_named(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "page.safetensors"
    fake.write_text("<!DOCTYPE html><html>not found</html>")
    assert run(monkeypatch, "generate", "x", "-b", base / "base", "-a", fake, "-o", tmp_path / "x.png") == 2
    assert not (tmp_path / "x.png").exists()


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "style.safetensors", tmp_path / "b" / "style.safetensors", tmp_path / "other.safetensors"]
    assert adapter_names(paths) == ["a/style", "b/style", "other"]
    with pytest.raises(ConfigError, match="named twice"):
        adapter_names([paths[0], paths[0]])


def test_a_full_gpu_is_one_sentence(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr("lora_diffusion.generating.draw", full)
    assert run(monkeypatch, "generate", "x", "-b", base / "base", "-o", tmp_path / "x.png", "--steps", "1") == 2
    said = capsys.readouterr().err
    assert said.startswith("lora-diffusion: the GPU's memory is full")
    assert said.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_without_bitsandbytes_nf4_is_one_sentence(tmp_path: Path) -> None:
    config = toml(tmp_path / "blocks.toml", settings(tmp_path))
    code = f"import sys; sys.modules['bitsandbytes'] = None; sys.argv = ['x', 'train', {str(config)!r}]\n"
    code += "from lora_diffusion.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 2
    assert "needs bitsandbytes" in done.stderr
    assert "Traceback" not in done.stderr
