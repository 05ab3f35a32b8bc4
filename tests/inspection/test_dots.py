"""The dot plot: a row for each value, at its place, and no label on another."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

from lora_diffusion.inspection.dots import NAMES, SPAN, Dot, dots

SVG = "{http://www.w3.org/2000/svg}"


def test_every_value_has_its_row_and_its_place() -> None:
    panels = [("A & B", [Dot("one", 0.5, "7"), Dot("two", 1.0)]), ("C", [Dot("three", 0.75)])]
    root = ElementTree.fromstring(dots(panels, "share"))
    centres = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.findall(f"{SVG}circle")]
    xs, ys = zip(*centres, strict=True)
    assert xs[2] == sum(xs[:2]) / 2
    assert NAMES < xs[0] < xs[1] < NAMES + SPAN + 12
    places = {(text.attrib["x"], text.attrib["y"]) for text in root.findall(f"{SVG}text")}
    assert len(places) == len(root.findall(f"{SVG}text"))
    labels = sorted(
        float(text.attrib["y"]) for text in root.findall(f"{SVG}text") if text.text in ("one", "two", "three")
    )
    assert min(b - a for a, b in pairwise(labels)) >= 18
    assert list(ys) == sorted(ys)
    assert max(ys) < float(root.attrib["height"])


def test_one_value_alone_is_drawn() -> None:
    root = ElementTree.fromstring(dots([("A", [Dot("one", 0.5)])], "share"))
    assert len(root.findall(f"{SVG}circle")) == 1
