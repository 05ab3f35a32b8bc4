"""Three sweeps over one configuration: ranks at one alpha / rank, methods as near to equal parameters as each can come,
and sets of target layers.

    python train_scripts/sweep.py train_scripts/configs/ink.toml --out runs/sweep train.steps=100
    python train_scripts/sweep.py CONFIG.toml --base FOLDER --out runs/ranks --sweeps rank --ranks 1,4,16

Every trial is a run of the trainer in OUT/trials/NAME, judged by the mean error on held-out pictures. Interrupted, the
same command goes on, in the middle of a trial too. OUT/results.json, results.md and results.svg are written anew after
each trial. A method that is not defined on all target layers has layers of its own (`trials.py`); what cannot be
compared, and a trial that fails, is listed and left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trials import Trial, plan

from lora_diffusion import ConfigError, LoraDiffusionError, TrainConfig, train
from lora_diffusion.inspection.dots import Dot, dots


@dataclass(frozen=True)
class Result:
    """What came of a trial. Losses are mean squared errors over held-out pictures; seconds are of the last start on."""

    trial: Trial
    heldout_base: float
    heldout_adapter: float
    seconds: float
    file_bytes: int


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, run what is missing, write the results."""
    given = _arguments().parse_intermixed_args(words)
    assignments = [*given.settings, *([f"base={given.base}"] if given.base else [])]
    config = TrainConfig.load(given.config, assignments)
    trials, left_out = plan(config, given.sweeps.split(","), _numbers(given.ranks), given.methods)
    for line in left_out:
        print(f"left out: {line}")
    results, alike = list[Result](), dict[str, Result]()
    for number, trial in enumerate(trials, 1):
        print(f"{number}/{len(trials)} {trial.sweep} {trial.name}: {trial.parameters:,} parameters", flush=True)
        try:
            result = run(config, trial, given.out / "trials" / f"{trial.sweep}-{trial.name}", alike)
        except TrialError as error:
            print(f"left out: {trial.sweep} {trial.name}: {error}")
            continue
        if result is None:
            print("interrupted; the same command goes on")
            return
        results.append(result)
        write(results, given.out)
    print((given.out / "results.md").read_text("utf-8"))


class TrialError(Exception):
    """A trial that could not be trained to its end, and why."""


def run(config: TrainConfig, trial: Trial, folder: Path, alike: dict[str, Result]) -> Result | None:
    """Train, or read what was trained, by this trial or by one of the same settings; None where it was interrupted.

    ConfigError for a folder of other settings, TrialError for one that diverged or cannot be done.
    """
    changed = config.changed(*trial.settings, f"output={folder}", f"name={folder.name}")
    kept, asked = folder / "result.json", changed.model_dump(mode="json")
    same = json.dumps({**asked, "output": None, "name": None}, sort_keys=True)
    if same in alike:
        return replace(alike[same], trial=trial)
    if kept.is_file():
        found = json.loads(kept.read_text("utf-8"))
        if found["settings"] != asked:
            raise ConfigError(f"{kept} was made with other settings; choose another --out")
        return alike.setdefault(same, Result(trial, **found["result"]))
    share_cache(folder)
    try:
        done = train(changed)
    except LoraDiffusionError as error:
        raise TrialError(str(error)) from None
    if done.adapter is None:
        return None
    result = Result(trial, done.heldout_base, done.heldout_adapter, done.seconds, done.adapter.stat().st_size)
    measured = {key: value for key, value in asdict(result).items() if key != "trial"}
    draft = kept.with_suffix(".part")
    draft.write_text(json.dumps({"settings": asked, "result": measured}), "utf-8")
    draft.replace(kept)
    return alike.setdefault(same, result)


def share_cache(folder: Path) -> None:
    """Have all trials keep what they encode, which is named by its content, in one place; each its own if need be."""
    (shared := folder.parents[1] / "cache").mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # it is there, or links are not allowed
        (folder / "cache").symlink_to(shared.resolve())


def write(results: Sequence[Result], out: Path) -> None:
    """results.json, a table in results.md and a plot in results.svg; shares are of the first trial's base."""
    rows = [
        {**asdict(one.trial), **{key: value for key, value in asdict(one).items() if key != "trial"}} for one in results
    ]
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    lines = [
        "| sweep | trial | parameters | rate | held-out loss | of the base's | file |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    panels: dict[str, list[Dot]] = {}
    for one in results:
        share = one.heldout_adapter / results[0].heldout_base
        cells = (one.trial.sweep, one.trial.name, f"{one.trial.parameters:,}", f"{one.trial.lr:g}")
        more = (f"{one.heldout_adapter:.5f}", f"{share:.1%}", f"{one.file_bytes / 1024:,.0f} KiB")
        lines.append(f"| {' | '.join((*cells, *more))} |")
        panels.setdefault(one.trial.sweep, []).append(Dot(one.trial.name, share, f"{one.trial.parameters:,} numbers"))
    if "method" in panels:
        panels["method"].sort(key=lambda dot: dot.value)
    (out / "results.md").write_text("\n".join(lines) + "\n", "utf-8")
    titles = {"rank": "Ranks", "method": "Methods, parameters as equal as each allows", "targets": "Target layers"}
    drawn = dots([(titles[sweep], rows) for sweep, rows in panels.items()], "held-out loss over the base's")
    (out / "results.svg").write_text(drawn, "utf-8")


def _numbers(text: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise ConfigError(f"--ranks {text!r}: expected whole numbers above 0 such as 1,4,16")
    return [int(part) for part in text.split(",")]


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file of one run")
    parser.add_argument("settings", nargs="*", help="key=value, as of lora-diffusion train")
    parser.add_argument("--out", type=Path, required=True, help="folder for trials and results")
    parser.add_argument("--base", help="pipeline folder instead of the configuration's")
    parser.add_argument("--sweeps", default="rank,method,targets")
    parser.add_argument("--ranks", default="1,2,4,8,16,32")
    parser.add_argument("--methods", help="names, comma between; all that there are otherwise")
    return parser


if __name__ == "__main__":
    try:
        main()
    except LoraDiffusionError as error:
        raise SystemExit(f"sweep: {error}") from None
