"""Progress bars and closing lines that several commands show."""

from __future__ import annotations

import math
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.loop import Progress as Step
from lora_diffusion.training.loop import TrainResult, train

STAGES = {"prepare": "encoding pictures", "train": "training", "measure": "measuring on held-out pictures"}
console = Console()


def bar() -> Progress:
    """A progress bar with count, note, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class TrainingBar:
    """Turns the loop's reports into a bar for each stage, with loss and speed."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, object] = {}
        self.smooth = math.nan

    def __call__(self, step: Step) -> None:
        """Show one report."""
        if step.stage not in self.tasks:
            self.tasks[step.stage] = self.progress.add_task(STAGES[step.stage], total=step.total, note="")
        task = self.progress.tasks[list(self.tasks).index(step.stage)]
        note = ""
        if step.stage == "train":
            self.smooth = step.loss if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * step.loss
            note = f"loss {self.smooth:.4f}" + (f" · {task.speed:.2f} steps/s" if task.speed else "")
        self.progress.update(task.id, completed=step.done, note=note)


def show_training(config: TrainConfig) -> TrainResult:
    """Train with a progress bar and say what came out; exit code 130 when interrupted."""
    with bar() as progress:
        result = train(config, TrainingBar(progress))
    if result.report is not None:
        console.print(str(result.report), highlight=False)
    unchanged = "no byte of the backbone changed" if result.backbone_unchanged else "THE BACKBONE CHANGED"
    if result.adapter is None:
        console.print(f"interrupted after step {result.steps}, saved; {unchanged}; the same command goes on")
        raise typer.Exit(130)
    console.print(
        f"{result.adapter}: {result.parameters:,} parameters, {_size(result.adapter)}; "
        f"held-out loss {result.heldout_base:.4f} -> {result.heldout_adapter:.4f}; {unchanged}"
    )
    return result


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.2f} MiB"
