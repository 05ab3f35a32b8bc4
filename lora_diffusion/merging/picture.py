"""Conflicts as a picture: a heat map with a row for each block and three columns for each pair of adapters."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lora_diffusion.errors import ConfigError
from lora_diffusion.merging.conflicts import Conflict

MEASURES = ("columns", "rows", "signs")  # each from 0, out of each other's way, to 1

_INK, _PAPER, _EMPTY = (24, 24, 28), (255, 255, 255), (236, 236, 240)
_COLD, _WARM, _HOT = (247, 250, 252), (253, 184, 99), (165, 15, 21)
_CELL, _GAP, _SIZE = (76, 30), 10, 15  # width and height, space, letters; pixels


def heat_map(found: Sequence[Conflict]) -> Image.Image:
    """Overlaps and opposed signs of every pair in every block, as colours and figures. ConfigError where none met."""
    if not found:
        raise ConfigError("conflicts: the adapters change no layer in common; there is nothing to draw")
    pairs = list(dict.fromkeys((row.first, row.second) for row in found))
    places = list(dict.fromkeys((row.component, row.block) for row in found))
    figures = {(row.first, row.second, row.component, row.block): row for row in found}
    font = ImageFont.load_default(_SIZE)
    names = [" ".join(place) for place in places]
    heads = [_shortened(" / ".join(pair), font, 3 * _CELL[0]) for pair in pairs]
    left = round(max(font.getlength(name) for name in names)) + 2 * _GAP
    top = 2 * _CELL[1] + _GAP
    size = (left + len(pairs) * (3 * _CELL[0] + _GAP), top + len(places) * _CELL[1] + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(names):
        pen.text((_GAP, top + (number + 0.5) * _CELL[1]), name, _INK, font, anchor="lm")
    for column, pair in enumerate(pairs):
        x = left + column * (3 * _CELL[0] + _GAP)
        pen.text((x + 1.5 * _CELL[0], _CELL[1] / 2 + _GAP / 2), heads[column], _INK, font, anchor="mm")
        for part, measure in enumerate(MEASURES):
            middle = x + (part + 0.5) * _CELL[0]
            pen.text((middle, 1.5 * _CELL[1] + _GAP / 2), measure, _INK, font, anchor="mm")
            for number, place in enumerate(places):
                row = figures.get((*pair, *place))
                value = None if row is None else float(getattr(row, measure))
                _cell(pen, (x + part * _CELL[0], top + number * _CELL[1]), value, font)
    return sheet


def _cell(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    value: float | None,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    box = (at[0], at[1], at[0] + _CELL[0] - 2, at[1] + _CELL[1] - 2)
    pen.rectangle(box, _EMPTY if value is None else _colour(value))
    if value is not None:
        ink = _PAPER if value > 0.7 else _INK
        pen.text((at[0] + _CELL[0] / 2, at[1] + _CELL[1] / 2), f"{value:.2f}", ink, font, anchor="mm")


def _colour(value: float) -> tuple[int, int, int]:
    """From pale over amber at 0.5 to dark red."""
    value = max(0.0, min(1.0, value))
    low, high, part = (_COLD, _WARM, 2 * value) if value < 0.5 else (_WARM, _HOT, 2 * value - 1)
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
