"""SIGKILL at random moments, again and again: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from lora_diffusion import train
from lora_diffusion.training.checkpoints import find_checkpoints
from tests.cli.test_cli import toml
from tests.training.pictures import config, settings

ROOT = Path(__file__).parents[2]
STEPS = 30
KILLS = 2


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = train(config(tmp_path, steps=STEPS, checkpoint_every=1)).adapter
    assert whole is not None
    given = settings(tmp_path, steps=STEPS, checkpoint_every=1) | {"output": str(tmp_path / "killed")}
    file, checkpoints = toml(tmp_path / "killed.toml", given), tmp_path / "killed" / "checkpoints"
    moment = random.Random(0)
    for kill in range(1, KILLS + 1):
        process = _start(file)
        _wait_for_step(process, checkpoints, kill * STEPS // (KILLS + 2))
        time.sleep(moment.uniform(0, 0.1))  # in a step, in a write, between the two
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was to be killed before its end"
        assert find_checkpoints(checkpoints), "a complete checkpoint is always there"
    last = _start(file)
    assert last.wait(600) == 0
    assert (tmp_path / "killed" / whole.name).read_bytes() == whole.read_bytes()


def _start(file: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "lora_diffusion", "train", str(file)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=quiet, stderr=quiet)


def _wait_for_step(process: subprocess.Popen[bytes], checkpoints: Path, step: int) -> None:
    while process.poll() is None:
        found = find_checkpoints(checkpoints)
        if found and int(found[-1].name.removeprefix("step-")) >= step:
            return
        time.sleep(0.01)
