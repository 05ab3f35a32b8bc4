"""Weights as text, in prompts, options and recipes: `0.8`, `0@0,1@0.5`, `te=0.5:unet=1`, `0.8:mask=left.png`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion.errors import ConfigError
from lora_diffusion.gates.masks import Region, is_rectangle, mask_again, write_mask
from lora_diffusion.gates.schedules import Keyframes, Window, parse_schedule

Find = Callable[[str], str | Path]  # a mask's name as it was written -> its file
_BETWEEN = re.compile(r":(?![\\/])")  # not the colon of C:\left.png


def parse_weight(text: str, find: Find = Path) -> Any:
    """A number, a schedule, or parts joined by ":" (`te=0.5:unet=0@0,1@0.5`); with a part `mask=` a region of that.

    A mask is a rectangle (`mask=0-0.5,0-1`) or the name of a picture, which `find` turns into its path. ConfigError
    for anything else.
    """
    parts = [part.partition("=") for part in _BETWEEN.split(text)] if "=" in text else []
    if masks := [value.strip() for name, _, value in parts if name.strip() == "mask"]:
        if len(masks) > 1 or not masks[0]:
            raise ConfigError(f"weight {text!r}: expected one mask, such as 0.8:mask=left.png or 0.8:mask=0-0.5,0-1")
        _refuse_colon(text, masks[0], parts)
        rest = ":".join("".join(part) for part in parts if part[0].strip() != "mask")
        mask = masks[0] if is_rectangle(masks[0]) else find(masks[0])
        return Region(mask, parse_weight(rest, find) if rest else 1.0)
    if parts:
        if not all(name.strip() and value.strip() for name, _, value in parts):
            raise ConfigError(f"weight {text!r}: expected parts such as te=0.5:unet=1")
        return {name.strip(): parse_weight(value, find) for name, _, value in parts}
    if "@" in text:
        parse_schedule(text)
        return text
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            f"weight {text!r}: expected a number, a schedule (0@0,1@0.5), parts (te=0.5:unet=1) or a region "
            "(0.8:mask=left.png)"
        ) from None
    if not math.isfinite(number):
        raise ConfigError(f"weight {text!r} is not a finite number")
    return number


def _refuse_colon(text: str, mask: str, parts: Sequence[tuple[str, str, str]]) -> None:
    """ConfigError where what follows the mask is no weight but the end of its file's name."""
    after = next(i for i, part in enumerate(parts) if part[0].strip() == "mask") + 1
    name, equals, _ = parts[after] if after < len(parts) else ("0", "", "")
    try:
        _ = equals or parse_weight(name)
    except ConfigError:
        raise ConfigError(
            f"weight {text!r}: a ':' ends the mask's name, here {mask!r}, and {name!r} is no weight; rename the "
            "picture so that it has no ':'"
        ) from None


def spell_weight(weight: Any, masks: MutableMapping[str, str] | None = None) -> Any:
    """`weight` as JSON can say it, so that `read_weight` gives the same. ConfigError for functions.

    A region is {"mask": …, "weight": …}: its rectangle, or the hash under which `masks` then holds its picture.
    """
    if isinstance(weight, Mapping):
        return {str(key): spell_weight(value, masks) for key, value in weight.items()}
    if isinstance(weight, list | tuple):
        return [spell_weight(one, masks) for one in weight]
    if isinstance(weight, Region) and isinstance(weight.mask, str) and is_rectangle(weight.mask):
        return {"mask": weight.mask, "weight": spell_weight(weight.weight, masks)}
    if isinstance(weight, Region) and masks is not None:
        return {"mask": write_mask(weight, masks), "weight": spell_weight(weight.weight, masks)}
    if isinstance(weight, Keyframes | Window):
        return str(weight)
    if isinstance(weight, int | float | str):
        return weight
    raise ConfigError(f"weight {weight!r} cannot be written down; a recipe holds numbers, schedules, lists and parts")


def read_weight(said: Any, masks: Mapping[str, str]) -> Any:
    """What `spell_weight` wrote. ConfigError for a mask that is not in `masks` or has other pixels there."""
    if isinstance(said, list):
        return [read_weight(one, masks) for one in said]
    if not isinstance(said, dict):
        return said
    if "mask" not in said:
        return {key: read_weight(value, masks) for key, value in said.items()}
    mask = str(said["mask"])
    if not is_rectangle(mask) and mask not in masks:
        raise ConfigError(f"mask {mask[:12]}… is not there")
    return Region(mask if is_rectangle(mask) else mask_again(mask, masks[mask]), read_weight(said["weight"], masks))


def show_weight(weight: Any) -> str:
    """`weight` for people, as it is spelled at the terminal where it can be."""
    if isinstance(weight, Region):
        mask = weight.mask if isinstance(weight.mask, str) else getattr(weight.mask, "name", "…")
        return f"{show_weight(weight.weight)}:mask={mask}"
    if isinstance(weight, Mapping):
        return ":".join(f"{key}={show_weight(value)}" for key, value in weight.items())
    return str(weight)


def times(weight: Any, factor: Any) -> Any:
    """`weight` multiplied by `factor`; one of them may be a schedule as text. ConfigError for two schedules."""
    if isinstance(weight, Region):
        return weight.at(times(weight.weight, factor))
    if isinstance(weight, Mapping):
        return {key: times(value, factor) for key, value in weight.items()}
    if isinstance(weight, str) and isinstance(factor, str):
        raise ConfigError(f"weights {weight!r} and {factor!r} are both schedules; expected a number for one")
    if isinstance(factor, str):
        weight, factor = factor, weight
    if not isinstance(weight, str):
        return weight * factor
    schedule = parse_schedule(weight)
    if isinstance(schedule, Window):
        return str(Window(schedule.weight * factor, schedule.start, schedule.end))
    return str(Keyframes(tuple((at, value * factor) for at, value in schedule.points)))
