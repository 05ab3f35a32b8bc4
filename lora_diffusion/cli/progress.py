"""Progress bars and closing lines that several commands show."""

from __future__ import annotations

import math
import time
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lora_diffusion.quickstart import Plan, Shown, show
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
        self.tasks: dict[str, TaskID] = {}
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


def show_quickstart(plan: Plan) -> None:
    """Train, draw, score, and sum it all up in a table."""
    start = time.monotonic()
    result = show_training(plan.config)
    trained = time.monotonic()
    assert result.adapter is not None
    with bar() as progress:
        tasks: dict[str, TaskID] = {}

        def listen(stage: str, done: int, total: int) -> None:
            task = tasks.setdefault(stage, TaskID(-1))
            if task == -1:
                task = tasks[stage] = progress.add_task(stage, total=total, note="")
            progress.update(task, completed=done)

        shown = show(plan, result.adapter, listen)
    console.print(_summary(plan, result, shown, trained - start))
    console.print(f"\nLook at [bold]{shown.grid}[/bold]", highlight=False)


def _summary(plan: Plan, result: TrainResult, shown: Shown, training: float) -> Table:
    table = Table(title="What happened", show_header=False, title_justify="left")
    steps = f"{result.steps} steps, {result.seconds / max(1, result.steps):.2f} s each"
    table.add_row(f"training ({plan.config.backbone.precision})", f"{training:.0f} s ({steps})")
    for stage, seconds in shown.seconds.items():
        table.add_row(stage, f"{seconds:.0f} s")
    table.add_row("held-out loss, base → adapter", f"{result.heldout_base:.4f} → {result.heldout_adapter:.4f}")
    score = f"{shown.score_before:.2f} → {shown.score_after:.2f} (0: as the base draws, 1: as the pack's true pictures)"
    table.add_row(f"style score on {shown.scored} things not in the pack", score)
    table.add_row("backbone", "no byte changed" if result.backbone_unchanged else "CHANGED")
    assert result.adapter is not None
    table.add_row("adapter", f"{result.adapter} ({_size(result.adapter)}, {result.parameters:,} parameters)")
    if shown.second is None:
        table.add_row("second adapter", "left out: it was made for the shipped base model")
    return table


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.2f} MiB"
