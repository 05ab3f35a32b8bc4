"""Interleaved timing: every case once a round, so that a busy machine slows all alike; medians and spread."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of CPU time (wall time on a GPU) a case: median, lowest, highest. One round before is not counted."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for number in range(rounds + 1):
        for name, case in cases.items():
            start = clock()
            case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(clock() - start)
    return {n: {"median": statistics.median(t), "low": min(t), "high": max(t)} for n, t in times.items()}


def write(script: str, results: dict[str, Any]) -> None:
    """The results as JSON next to the script, with what they were taken on."""
    packages = {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    taken = {"on": device, "threads": torch.get_num_threads(), "packages": packages}
    path = Path(script).with_suffix(".json")
    path.write_text(json.dumps({**taken, **results}, indent=2) + "\n")
    print(path.read_text())
