"""A dot plot as SVG: a row for each name and a dot at its value, so that no two labels can meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lora_diffusion.inspection.charts import COLOURS

NAMES, SPAN, NOTES, ROW = 190, 380, 130, 18  # pixels: width of names, of values and of notes, height of a row
EDGE = 12  # pixels round it all


@dataclass(frozen=True)
class Dot:
    """One row: its name, its value, and what is said of it at the right."""

    name: str
    value: float
    note: str = ""


def dots(panels: Sequence[tuple[str, Sequence[Dot]]], across: str) -> str:
    """Titled panels below each other over one axis, which says `across`; values are shares, written in percent."""
    values = [dot.value for _, rows in panels for dot in rows]
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.01
    low, high = low - margin, high + margin
    drawn, y = list[str](), float(EDGE)
    for number, (title, rows) in enumerate(panels):
        drawn.append(_text(EDGE, y + 13, title, 'font-size="13" font-weight="bold"'))
        y += 1.3 * ROW
        for dot in rows:
            drawn.append(_row(dot, y, (dot.value - low) / (high - low), COLOURS[number % len(COLOURS)]))
            y += ROW
        y += 0.7 * ROW
    drawn += [_text(_x(place), y, f"{low + place * (high - low):.1%}", 'text-anchor="middle"') for place in (0, 0.5, 1)]
    drawn.append(_text(_x(0.5), y + ROW, across, 'text-anchor="middle"'))
    width, height = 2 * EDGE + NAMES + SPAN + NOTES, round(y + ROW + EDGE)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    white = ' font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([start + white, *drawn, "</svg>"]) + "\n"


def _row(dot: Dot, y: float, place: float, colour: str) -> str:
    middle = y + ROW / 2
    line = f'<path d="M{_x(0)},{middle} H{_x(1)}" stroke="#ddd"/>'
    point = f'<circle cx="{_x(place):.1f}" cy="{middle}" r="4" fill="{colour}"/>'
    name = _text(EDGE + NAMES - 10, middle + 4, dot.name, 'text-anchor="end"')
    return line + point + name + _text(_x(1) + 10, middle + 4, dot.note, 'fill="#666"')


def _x(place: float) -> float:
    return EDGE + NAMES + SPAN * place


def _text(x: float, y: float, words: str, how: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {how}>{escape(words)}</text>'
