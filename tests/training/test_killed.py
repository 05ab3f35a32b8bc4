"""SIGKILL at random moments, again and again: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import random
import signal
import time
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

from lora_diffusion import TrainConfig, train
from lora_diffusion.training.checkpoints import find_checkpoints
from tests.training.pictures import config

STEPS = 30
KILLS = 2


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = train(config(tmp_path, steps=STEPS, checkpoint_every=1)).adapter
    assert whole is not None
    again = config(tmp_path, steps=STEPS, checkpoint_every=1).changed(f"output={tmp_path / 'killed'}")
    checkpoints = tmp_path / "killed" / "checkpoints"
    moment = random.Random(0)
    for kill in range(1, KILLS + 1):
        process = _start(again)
        _wait_for_step(process, checkpoints, kill * STEPS // (KILLS + 2))
        time.sleep(moment.uniform(0, 0.1))  # in a step, in a write, between the two
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was to be killed before its end"
        assert find_checkpoints(checkpoints), "a complete checkpoint is always there"
    last = _start(again)
    last.join(600)
    assert last.exitcode == 0
    assert (tmp_path / "killed" / whole.name).read_bytes() == whole.read_bytes()


def _start(again: TrainConfig) -> ForkProcess:
    process = get_context("fork").Process(target=train, args=(again,))  # forked: importing it all takes ten seconds
    process.start()
    return process


def _wait_for_step(process: ForkProcess, checkpoints: Path, step: int) -> None:
    while process.is_alive():
        found = find_checkpoints(checkpoints)
        if found and int(found[-1].name.removeprefix("step-")) >= step:
            return
        time.sleep(0.01)
