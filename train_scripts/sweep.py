"""Three sweeps over one configuration: ranks at one alpha / rank, methods at equal parameters, sets of target layers.

    python train_scripts/sweep.py train_scripts/configs/ink.toml --out runs/sweep train.steps=100
    python train_scripts/sweep.py CONFIG.toml --base FOLDER --out runs/ranks --sweeps rank --ranks 1,4,16

Every trial is a run of the trainer in OUT/trials/NAME, judged by the mean error on held-out pictures. Interrupted, the
same command goes on, in the middle of a trial too. OUT/results.json, results.md and results.svg are written anew after
each trial. Methods that are not defined on all target layers are listed and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from lora_diffusion import ConfigError, LoraDiffusionError, TrainConfig, train
from lora_diffusion.adapter import DENOISERS
from lora_diffusion.families.skeletons import skeleton_of
from lora_diffusion.inspection.methods import count_parameters, has_rank
from lora_diffusion.methods import METHODS
from lora_diffusion.targets import find_targets

TARGETS = ("attention-qv", "attention", "attention+ff", "attention+ff+conv")
LARGEST = 1024  # rank that is looked at to make parameters equal
SIDE, MARGIN = 320, 48  # of a panel of the plot, pixels


@dataclass(frozen=True)
class Trial:
    """One run: the settings in which it differs, and how many numbers it trains."""

    sweep: str
    name: str
    settings: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Result:
    """What came of a trial. Losses are mean squared errors over held-out pictures."""

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
    results: list[Result] = []
    for number, trial in enumerate(trials, 1):
        print(f"{number}/{len(trials)} {trial.sweep} {trial.name}: {trial.parameters:,} parameters", flush=True)
        result = run(config, trial, given.out / "trials" / f"{trial.sweep}-{trial.name}")
        if result is None:
            print("interrupted; the same command goes on")
            return
        results.append(result)
        write(results, given.out)
    print((given.out / "results.md").read_text("utf-8"))


def plan(
    config: TrainConfig, sweeps: Iterable[str], ranks: Sequence[int], methods: str | None = None
) -> tuple[list[Trial], list[str]]:
    """The trials, and what is left out with the reason. ConfigError for a sweep that there is not."""
    models = skeleton_of(config.base)
    model = next(models[name] for name in DENOISERS if name in models)
    trials, left_out = list[Trial](), list[str]()
    for sweep in sweeps:
        if sweep == "rank":
            trials += by_rank(config, model, ranks)
        elif sweep == "method":
            found, without = by_method(config, model, methods.split(",") if methods else list(METHODS))
            trials, left_out = trials + found, left_out + without
        elif sweep == "targets":
            trials += by_targets(config, model)
        else:
            raise ConfigError(f"no sweep {sweep!r}; there are rank, method and targets")
    return trials, left_out


def by_rank(config: TrainConfig, model: nn.Module, ranks: Sequence[int]) -> list[Trial]:
    """Each rank with alpha / rank as in the configuration."""
    adapter = config.adapter
    ratio = 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank
    layers = list(find_targets(model, adapter.targets).values())
    return [
        Trial(
            "rank",
            str(rank),
            (f"adapter.rank={rank}", f"adapter.alpha={ratio * rank}"),
            count_parameters(adapter.method, layers, rank, adapter.settings) or 0,
        )
        for rank in ranks
    ]


def by_method(config: TrainConfig, model: nn.Module, names: Sequence[str]) -> tuple[list[Trial], list[str]]:
    """Each method with the rank whose parameters come nearest to those of the configuration's own."""
    adapter = config.adapter
    layers = list(find_targets(model, adapter.targets).values())
    wanted = count_parameters(adapter.method, layers, adapter.rank, adapter.settings) or 0
    trials, left_out = list[Trial](), list[str]()
    ratio = 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank
    for name in names:
        if not all(METHODS[name].supports(layer) for layer in layers):
            left_out.append(f"method {name}, which is not defined on all of {adapter.targets}")
            continue
        rank = nearest_rank(name, layers, wanted) if has_rank(name) else 1
        settings = [f"adapter.method={name}", f"adapter.rank={rank}"]
        settings += [] if name == "oft" else [f"adapter.alpha={ratio * rank}"]  # there it is a bound
        own = adapter.settings if name == adapter.method else None
        settings += [] if own else ["adapter.settings={}"]
        trials.append(Trial("method", name, tuple(settings), count_parameters(name, layers, rank, own) or 0))
    return trials, left_out


def nearest_rank(method: str, layers: Sequence[nn.Module], wanted: int) -> int:
    """The rank at which a method trains about `wanted` numbers: doubled until it is passed, then halved down to."""
    low, high = 1, 1
    while high < LARGEST and _count(method, layers, high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(method, layers, middle) < wanted else (low, middle)
    return min((low, high), key=lambda rank: abs(_count(method, layers, rank) - wanted))


def by_targets(config: TrainConfig, model: nn.Module) -> list[Trial]:
    """Each set of layers at the configuration's rank."""
    adapter = config.adapter
    return [
        Trial(
            "targets",
            targets,
            (f"adapter.targets={targets}",),
            count_parameters(adapter.method, list(find_targets(model, targets).values()), adapter.rank) or 0,
        )
        for targets in TARGETS
    ]


def run(config: TrainConfig, trial: Trial, folder: Path) -> Result | None:
    """Train, or read what was trained; None where it was interrupted. ConfigError for a folder of other settings."""
    changed = config.changed(*trial.settings, f"output={folder}", f"name={folder.name}")
    kept, asked = folder / "result.json", changed.model_dump(mode="json")
    if kept.is_file():
        found = json.loads(kept.read_text("utf-8"))
        if found["settings"] != asked:
            raise ConfigError(f"{kept} was made with other settings; choose another --out")
        return Result(trial, **found["result"])
    done = train(changed)
    if done.adapter is None:
        return None
    result = Result(trial, done.heldout_base, done.heldout_adapter, done.seconds, done.adapter.stat().st_size)
    measured = {key: value for key, value in asdict(result).items() if key != "trial"}
    draft = kept.with_suffix(".part")
    draft.write_text(json.dumps({"settings": asked, "result": measured}), "utf-8")
    draft.replace(kept)
    return result


def write(results: Sequence[Result], out: Path) -> None:
    """results.json, a table in results.md and a plot in results.svg."""
    rows = [{**asdict(result.trial), **asdict(result)} for result in results]
    (out / "results.json").write_text(json.dumps(rows, indent=1), "utf-8")
    lines = [
        "| sweep | trial | parameters | held-out loss | of the base's | seconds | file |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for one in results:
        share = one.heldout_adapter / one.heldout_base
        cells = (one.trial.sweep, one.trial.name, f"{one.trial.parameters:,}", f"{one.heldout_adapter:.5f}")
        more = (f"{share:.1%}", f"{one.seconds:.0f}", f"{one.file_bytes / 1024:,.0f} KiB")
        lines.append(f"| {' | '.join((*cells, *more))} |")
    (out / "results.md").write_text("\n".join(lines) + "\n", "utf-8")
    (out / "results.svg").write_text(plot(results), "utf-8")


def plot(results: Sequence[Result]) -> str:
    """One panel a sweep: parameters (logarithmic) against held-out loss over the base's, as SVG."""
    sweeps = list(dict.fromkeys(result.trial.sweep for result in results))
    shares = [one.heldout_adapter / one.heldout_base for one in results]
    heights = (min(shares), max([*shares, min(shares) + 1e-6]))
    panels = [
        _panel(sweep, [one for one in results if one.trial.sweep == sweep], SIDE * column + MARGIN, heights)
        for column, sweep in enumerate(sweeps)
    ]
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE * len(sweeps)}" height="{SIDE}"'
    white = ' font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([start + white, *panels, "</svg>"])


def _panel(sweep: str, results: Sequence[Result], start: int, heights: tuple[float, float]) -> str:
    low, high = heights
    logs = [math.log10(max(1, one.trial.parameters)) for one in results]
    left, right = min(logs), max([*logs, min(logs) + 1e-6])
    span = SIDE - 2 * MARGIN
    parts = [
        f'<text x="{start}" y="24" font-size="13">{sweep}</text>',
        f'<rect x="{start}" y="{MARGIN}" width="{span}" height="{span}" fill="none" stroke="#999"/>',
        f'<text x="{start}" y="{SIDE - 30}">{10**left:,.0f}</text>',
        f'<text x="{start + span}" y="{SIDE - 30}" text-anchor="end">{10**right:,.0f} parameters</text>',
        f'<text x="{start - 40}" y="{MARGIN + 4}">{high:.1%}</text>',
        f'<text x="{start - 40}" y="{MARGIN + span}">{low:.1%}</text>',
    ]
    for one, log in zip(results, logs, strict=True):
        x = start + span * (log - left) / (right - left)
        y = MARGIN + span * (high - one.heldout_adapter / one.heldout_base) / (high - low)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(f'<text x="{x + 5:.1f}" y="{y - 4:.1f}">{one.trial.name}</text>')
    return "\n".join(parts)


def _count(method: str, layers: Sequence[nn.Module], rank: int) -> int:
    try:
        return count_parameters(method, layers, rank) or 0
    except ConfigError:  # a rank beyond the smallest layer
        return sys.maxsize


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
