"""Line and bar charts as SVG, drawn by hand: nothing to install, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea")
WIDTH, HEIGHT, LEFT, BELOW = 640, 220, 62, 26  # pixels; room for the numbers at the left and below


def lines(series: Sequence[tuple[str, Sequence[Point]]], across: str) -> str:
    """An SVG of named lines over one axis called `across`; points that are no numbers are left out."""
    kept = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in series]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return "<p>nothing was measured</p>"
    xs, ys = ([p[axis] for _, points in kept for p in points] for axis in (0, 1))
    low, high = (min(xs), min(ys)), (max(xs), max(ys))
    drawn = [_frame(low, high, across)]
    for number, (name, points) in enumerate(kept):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_place(point, low, high) for point in points))
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(points) == 1:
            x, y = _place(points[0], low, high)
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        at = LEFT + 8 + number * 180
        drawn.append(f'<text x="{at}" y="12" fill="{colour}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(drawn)}</svg>'


def bar(share: float) -> str:
    """A horizontal bar, `share` (0 to 1) of its full width."""
    width = 160 * min(max(share, 0.0), 1.0)
    return f'<svg width="160" height="10"><rect width="{width:.1f}" height="10" rx="2" fill="{COLOURS[0]}"/></svg>'


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    sums, total = list[float](), 0.0
    for number, value in enumerate(values):
        total += value - (values[number - window] if number >= window else 0.0)
        sums.append(total / min(number + 1, window))
    return sums


def _frame(low: Point, high: Point, across: str) -> str:
    bottom, right = HEIGHT - BELOW, WIDTH - 8
    ends = [
        (LEFT - 4, 28, "end", f"{high[1]:.4g}"),
        (LEFT - 4, bottom, "end", f"{low[1]:.4g}"),
        (LEFT, bottom + 16, "start", f"{low[0]:g}"),
        (right, bottom + 16, "end", f"{high[0]:g} {across}"),
    ]
    axes = f'<path d="M{LEFT},20 V{bottom} H{right}" fill="none" stroke="#999"/>'
    words = (f'<text x="{x}" y="{y}" text-anchor="{side}">{escape(word)}</text>' for x, y, side, word in ends)
    return axes + "".join(words)


def _place(point: Point, low: Point, high: Point) -> Point:
    """Data -> pixels; a span of nothing is put in the middle."""
    shares = [(v - a) / (b - a) if b > a else 0.5 for v, a, b in zip(point, low, high, strict=True)]
    return LEFT + shares[0] * (WIDTH - 8 - LEFT), 20 + (1 - shares[1]) * (HEIGHT - BELOW - 20)
