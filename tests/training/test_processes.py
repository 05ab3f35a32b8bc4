"""Several processes do what one does with accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lora_diffusion import load_adapter, train
from tests.cli.test_cli import toml
from tests.training.pictures import config, settings

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "train.py"


def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    one = train(config(tmp_path, accumulate=2, steps=3)).adapter
    assert one is not None
    given = settings(tmp_path, steps=3) | {"output": str(tmp_path / "two")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [
            *launch,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            str(SCRIPT),
            str(toml(tmp_path / "two.toml", given)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_adapter(tmp_path / "two" / "blocks.safetensors").layers == load_adapter(one).layers
