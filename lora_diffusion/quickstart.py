"""The main job in one go: train a style on the shipped pack, blend it with a shipped adapter, judge and show it."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.data.examples import Example, find_examples
from lora_diffusion.data.pictures import open_picture
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.generating import Drawing, draw, reconstructed
from lora_diffusion.inspection.style import style_score
from lora_diffusion.pipelines import Opened, load_for_drawing
from lora_diffusion.sheet import contact_sheet, write_picture
from lora_diffusion.stack import AdapterStack
from lora_diffusion.training.config import TrainConfig, override

SHIPPED_GUIDANCE = 1.5  # what the base in samples/ draws best with
Listener = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Plan:
    """What a quickstart will do, from `samples/quickstart.toml`."""

    config: TrainConfig
    out: Path
    second: Path | None  # another adapter to blend with
    rows: tuple[str, ...]  # things that are not in the pack
    plain: Path  # pictures in the base's own look, to tell the style from
    how: Drawing


@dataclass(frozen=True)
class Shown:
    """What a quickstart made besides the adapter."""

    grid: Path
    score_before: float
    score_after: float
    scored: int  # held-out things, or all where none were held out by name
    second: str | None  # name of the second adapter, None when it does not fit the base
    seconds: dict[str, float]


def find_samples(folder: Path | None) -> Path:
    """The samples folder: the one given, `./samples`, the checkout's or the installed one."""
    package = Path(__file__).parent
    places = [folder] if folder is not None else [Path("samples"), package / "_samples", package.parent / "samples"]
    for place in places:
        if (place / "quickstart.toml").is_file():
            return place
    raise ConfigError(f"no samples in {', '.join(map(str, places))}: expected a folder with quickstart.toml in it")


def base_or_shipped(base: str | None, guidance: float | None) -> tuple[str, float | None]:
    """The base that is named, else the one that ships, with the guidance that suits it where none is given."""
    if base:
        return base, guidance
    return str(find_samples(None) / "base"), SHIPPED_GUIDANCE if guidance is None else guidance


def plan(samples: Path, out: Path, base: str | None, settings: Sequence[str]) -> Plan:
    """Read `quickstart.toml`; its paths are relative to the samples folder."""
    told = tomllib.loads((samples / "quickstart.toml").read_text("utf-8"))
    show: dict[str, Any] = told.pop("show")
    told["output"] = str(out)
    told["base"] = base or str(samples / told["base"])
    for key in ("folder", "heldout"):
        told["data"][key] = str(samples / told["data"][key])
    for setting in settings:
        override(told, setting)
    config = TrainConfig.parse(told, "quickstart")
    size = (config.data.resolution, config.data.resolution)
    how = Drawing(show["steps"], show["guidance"], size, batch=show["batch"])
    second = samples / show["second"]
    return Plan(config, out, second if second.is_file() else None, tuple(show["rows"]), samples / show["plain"], how)


def show(plan: Plan, adapter: Path, listen: Listener) -> Shown:
    """Draw the grid and score the style, on the pipeline that the adapter was trained over."""
    start = time.monotonic()
    opened = load_for_drawing(plan.config.base, None, plan.config.backbone.device)
    seconds = {"opening the base": time.monotonic() - start}
    with AdapterStack(opened.pipe) as stack:
        style = stack.add(adapter, name="style")
        second = _add_second(stack, plan.second)
        start = time.monotonic()
        grid = _grid(plan, opened, stack, style, second, listen)
        seconds["drawing the grid"] = time.monotonic() - start
        start = time.monotonic()
        before, after, scored = _score(plan, opened, stack, style, listen)
        seconds["scoring the style"] = time.monotonic() - start
    return Shown(grid, before, after, scored, second, seconds)


def _add_second(stack: AdapterStack, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return stack.add(path, 0.0)
    except AdapterMismatchError:
        return None  # made for the shipped base, and another one is in use


def _grid(plan: Plan, opened: Opened, stack: AdapterStack, style: str, second: str | None, listen: Listener) -> Path:
    columns: list[tuple[str, float, float]] = [("base", 0, 0), ("style 0.5", 0.5, 0), ("style 1.0", 1, 0)]
    if second is not None:
        columns += [(f"{second} 1.0", 0, 1), (f"style 0.6 + {second} 0.6", 0.6, 0.6)]
    drawn: list[list[Image.Image]] = []
    total = len(columns) * len(plan.rows)
    for _, strength, other in columns:
        stack.weigh(style, strength)
        if second is not None:
            stack.weigh(second, other)
        listen("drawing the grid", len(drawn) * len(plan.rows), total)
        drawn.append(_draw(plan, opened, plan.rows))
    listen("drawing the grid", total, total)
    path = plan.out / "grid.png"
    rows = [list(row) for row in zip(*drawn, strict=True)]
    title = f"{plan.config.name}, trained over {plan.config.backbone.precision}"
    write_picture(contact_sheet(rows, plan.rows, [name for name, *_ in columns], title=title), path)
    return path


def _score(plan: Plan, opened: Opened, stack: AdapterStack, style: str, listen: Listener) -> tuple[float, float, int]:
    """How far drawings of held-out things are from the plain look (0) to the pack's (1), before and after.

    Both looks are those of true pictures as the base's VAE gives them back: its blur is no style.
    """
    data = plan.config.data
    truth, heldout = find_examples(data.folder), list[Example]()
    if isinstance(data.heldout, Path):
        heldout = find_examples(data.heldout)
    kept = {e.picture.resolve() for e in heldout}
    size = plan.how.size or (data.resolution, data.resolution)
    references, others = (
        reconstructed(opened.pipe, [open_picture(e.picture) for e in examples], size)
        for examples in ([e for e in truth if e.picture.resolve() not in kept], find_examples(plan.plain))
    )
    things, scores = [e.caption for e in heldout or truth], list[float]()
    for strength in (0.0, 1.0):
        stack.weigh(style, strength)
        listen("scoring the style", len(scores) * len(things), 2 * len(things))
        scores.append(style_score(_draw(plan, opened, things), references, others))
    listen("scoring the style", 2 * len(things), 2 * len(things))
    return scores[0], scores[1], len(things)


def _draw(plan: Plan, opened: Opened, prompts: Sequence[str]) -> list[Image.Image]:
    return draw(opened.pipe, prompts, [plan.config.train.seed + i for i in range(len(prompts))], plan.how)
