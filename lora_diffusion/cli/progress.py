"""Progress bars and closing lines that several commands show."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager

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

from lora_diffusion.inspection.report import write_report
from lora_diffusion.quickstart import Plan, Shown, show
from lora_diffusion.sizes import size_of
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.loop import train
from lora_diffusion.training.results import Progress as Step
from lora_diffusion.training.results import TrainResult

STAGES = {"prepare": "encoding pictures", "train": "training", "measure": "measuring on held-out pictures"}
EVERY = 15.0  # seconds between lines of text where there is no terminal
console = Console()


def say(text: str) -> None:
    """Print as it is: no markup, no wrapping inside file names."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def saying_warnings() -> Generator[None]:
    """Warnings come as lines like the others."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
        yield


def bar() -> Progress:
    """A progress bar with count, note, elapsed and remaining time; nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class StageBars:
    """A bar for each stage, made when it is first heard of; lines of text now and then without a terminal."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        self.said = -math.inf

    def show(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move a stage's bar."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total, note="")
        self.progress.update(self.tasks[stage], completed=done, note=note)
        now = time.monotonic()
        if self.progress.disable and (done == total or now - self.said > EVERY):
            self.said = now
            say(f"{stage} {done}/{total} {note}".rstrip())


class TrainingBars(StageBars):
    """Turns the loop's reports into bars with loss and speed."""

    smooth, started = math.nan, math.nan

    def __call__(self, step: Step) -> None:
        """Show one report."""
        if step.stage == "note":
            say(step.said)
            return
        note = ""
        if step.stage == "train":
            if math.isnan(self.smooth):
                self.smooth, self.started, self.first = step.loss, time.monotonic(), step.done
            self.smooth = 0.95 * self.smooth + 0.05 * step.loss
            seconds = time.monotonic() - self.started
            speed = f" · {(step.done - self.first) / seconds:.2f} steps/s" if step.done > self.first else ""
            note = f"loss {self.smooth:.4f} · rate {step.rate:.1e}{speed}"
        self.show(STAGES[step.stage], step.done, step.total, note)


def show_training(config: TrainConfig) -> TrainResult:
    """Train with a progress bar and say what came out; exit code 130 when interrupted."""
    with bar() as progress:
        result = train(config, TrainingBars(progress))
    if result.report is not None:
        say(str(result.report))
    unchanged = "no byte of the backbone changed" if result.backbone_unchanged else "THE BACKBONE CHANGED"
    if not result.backbone_unchanged:
        say(f"{unchanged}: what was trained cannot be trusted; please report this")
        raise typer.Exit(1)
    if result.adapter is None:
        say(f"interrupted after step {result.steps}, saved; {unchanged}; the same command goes on")
        raise typer.Exit(130)
    say(
        f"{result.adapter}: {result.parameters:,} parameters, {size_of(result.adapter.stat().st_size)}; "
        f"held-out loss {result.heldout}; {unchanged}"
    )
    report, verdict = write_report(config, result)
    say(f"{verdict}\n{report}")
    return result


def show_quickstart(plan: Plan) -> None:
    """Train, draw, score, and sum it all up in a table."""
    start = time.monotonic()
    result = show_training(plan.config)
    trained = time.monotonic()
    assert result.adapter is not None
    with bar() as progress:
        shown = show(plan, result.adapter, StageBars(progress).show)
    console.print(_summary(plan, result, shown, trained - start))
    say(f"\nLook at {shown.grid}")


def _summary(plan: Plan, result: TrainResult, shown: Shown, training: float) -> Table:
    table = Table(title="What happened", show_header=False, title_justify="left")
    steps = f"{result.steps} steps"
    table.add_row(f"training ({plan.config.backbone.precision})", f"{training:.0f} s ({steps})")
    for stage, seconds in shown.seconds.items():
        table.add_row(stage, f"{seconds:.0f} s")
    table.add_row("held-out loss, base → adapter", result.heldout)
    score = f"{shown.score_before:.2f} → {shown.score_after:.2f} (0: the base's own look, 1: the pack's)"
    table.add_row(f"style score on {shown.scored} things not in the pack", score)
    table.add_row("backbone", "no byte changed" if result.backbone_unchanged else "CHANGED")
    assert result.adapter is not None
    table.add_row(
        "adapter", f"{result.adapter} ({size_of(result.adapter.stat().st_size)}, {result.parameters:,} parameters)"
    )
    if shown.second is None:
        table.add_row("second adapter", "left out: it was made for the shipped base model")
    return table
