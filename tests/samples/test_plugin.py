"""The sample plugin, installed by pip into a folder of its own: found by its entry points, keeping all promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "samples" / "plugin"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a Python which has the plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")  # building leaves things beside it
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    target = folder / "installed"
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(target), str(ROOT)]), "COLUMNS": "200"}


def said(environment: dict[str, str], *words: str) -> str:
    """What `python WORDS` says, which must end well."""
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_line_lists_its_method(environment: dict[str, str]) -> None:
    listed = said(environment, "-m", "lora_diffusion", "methods")
    assert re.search(r"fourierft\W+spectrum, grid\W+FourierFT: a weight's change", listed)


def test_its_own_tests_and_the_contracts_of_methods_and_formats_hold(environment: dict[str, str]) -> None:
    files = [str(PLUGIN / "tests"), "tests/methods/test_contract.py", "tests/formats/test_contract.py"]
    chosen = ["-k", "extras or fourierft or dotted"]
    output = said(environment, "-m", "pytest", "-n0", "-x", "-p", "no:cacheprovider", *files, *chosen)
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) >= 16
    assert "failed" not in output


def test_without_it_the_name_is_unknown() -> None:
    command = [sys.executable, "-m", "lora_diffusion", "methods"]
    plain = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    assert "lokr" in done.stdout
    assert "fourierft" not in done.stdout
