"""Seconds until a command answers, in fresh processes: `--help` and a header-only `inspect`, beside `import peft`.

    python benchmarks/start.py                       # needs `peft`

CPU seconds of the process and its children (wall seconds beside them), interleaved. Writes start.json beside itself.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from timing import write

ADAPTER = Path(__file__).parents[1] / "samples" / "adapters" / "ink.safetensors"
CASES = {
    "python alone": ["-c", "pass"],
    "--help": ["-m", "lora_diffusion", "--help"],
    "inspect --header": ["-m", "lora_diffusion", "inspect", "--header", str(ADAPTER)],
    "import lora_diffusion": ["-c", "import lora_diffusion"],
    "import torch": ["-c", "import torch"],
    "import peft": ["-c", "import peft"],
}
ROUNDS = 9


def once(words: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, time.perf_counter() - start


def main() -> None:
    """Every case once a round; the first round, which reads the files from disk, is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for number in range(ROUNDS + 1):
        for name, words in CASES.items():
            found = once(words)
            if number:
                taken[name].append(found)
    results = {
        name: {
            "cpu": statistics.median(cpu for cpu, _ in found),
            "lowest cpu": min(cpu for cpu, _ in found),
            "wall": statistics.median(wall for _, wall in found),
        }
        for name, found in taken.items()
    }
    write(__file__, {"rounds": ROUNDS, "seconds": results})


if __name__ == "__main__":
    main()
