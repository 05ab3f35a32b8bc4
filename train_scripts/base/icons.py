"""Icon sets from the npm registry, rendered to pictures: the raw material of the base and the packs.

A *thing* is an emojibase label ("red apple"); a *style* is one icon set's way of drawing it. Nothing
of the sets is kept in this repository but what `samples/` carries with its licence. Needs `npm` on
the PATH and the `samples` extra (`resvg-py`).
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

from PIL import Image

SIZE = 64  # pixels, width and height of every picture

#: style word -> npm package and version. The word is what captions say: "red apple, blob style".
SETS = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "blob": ("@iconify-json/noto-v1", "1.2.5"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "classic": ("@iconify-json/emojione", "1.2.3"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
    "clay": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "sticker": ("@iconify-json/twemoji", "1.2.5"),
}
BASE_STYLES = ("noto", "blob", "flat", "classic")  # the base model learns these; the others are held out
DEFAULT_STYLE = "noto"  # what a caption without a style word means
EMOJIBASE = ("emojibase-data", "17.0.0")
_FLAGS, _COMPONENTS = 9, 2  # emojibase groups without things in them


@dataclass(frozen=True)
class Thing:
    """One emojibase entry."""

    label: str
    code: str  # "1f34e", lower case, "-" between code points
    tags: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The label as icon sets spell it: "red-apple"."""
        plain = self.label.lower().replace("’", "").replace(":", "").replace(",", "")
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


class IconSets:
    """The installed icon sets below `folder` (fetched with npm when absent)."""

    def __init__(self, folder: Path) -> None:
        self.modules = folder / "node_modules"
        wanted = [f"{name}@{version}" for name, version in (*SETS.values(), EMOJIBASE)]
        if not all((self.modules / name).is_dir() for name, _ in (*SETS.values(), EMOJIBASE)):
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *wanted], check=True)
        self._icons: dict[str, dict] = {}

    @cached_property
    def things(self) -> dict[str, Thing]:
        """label -> thing, flags and components left out, in emojibase's order."""
        entries = json.loads((self.modules / EMOJIBASE[0] / "en" / "data.json").read_text("utf-8"))
        entries = sorted((e for e in entries if e.get("group") not in (None, _FLAGS, _COMPONENTS)), key=_order)
        return {e["label"]: Thing(e["label"], e["hexcode"].lower(), tuple(e.get("tags", ()))) for e in entries}

    def toned(self, thing: Thing) -> dict[int, Thing]:
        """The person in each skin tone there is (emojibase: 1 light to 5 dark), under the plain label."""
        return {tone: Thing(thing.label, code, thing.tags) for tone, code in self._skins.get(thing.label, {}).items()}

    @cached_property
    def _skins(self) -> dict[str, dict[int, str]]:
        entries = json.loads((self.modules / EMOJIBASE[0] / "en" / "data.json").read_text("utf-8"))
        single = {e["label"]: [s for s in e["skins"] if isinstance(s["tone"], int)] for e in entries if "skins" in e}
        return {label: {s["tone"]: s["hexcode"].lower() for s in skins} for label, skins in single.items()}

    def render(self, thing: Thing, style: str) -> Image.Image | None:
        """The thing in that style, RGB on white, 64x64; None where the set does not draw it."""
        if style == "clay":
            return self._picture_file(thing)
        svg = self._svg(thing, style)
        return None if svg is None else _rasterise(svg)

    def _picture_file(self, thing: Thing) -> Image.Image | None:
        assets = self.modules / SETS["clay"][0] / "assets"
        for code in (thing.code, thing.code.replace("-fe0f", "")):
            if (path := assets / f"{code}.webp").exists():
                with Image.open(path) as file:
                    return _on_white(file.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        return None

    def _svg(self, thing: Thing, style: str) -> str | None:
        book = self._book(style)
        name = next((n for n in _names(thing, book["chars"]) if n in book["icons"] or n in book["aliases"]), None)
        if name is None:
            return None
        icon = book["icons"].get(name) or book["icons"].get(book["aliases"][name]["parent"])
        if icon is None:
            return None
        width, height = icon.get("width", book["width"]), icon.get("height", book["height"])
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        box = f'viewBox="0 0 {width} {height}" width="{SIZE}" height="{SIZE}"'
        return f"<svg {names} {box}>{icon['body']}</svg>"

    def _book(self, style: str) -> dict:
        if style not in self._icons:
            package = self.modules / SETS[style][0]
            book = json.loads((package / "icons.json").read_text("utf-8"))
            chars = package / "chars.json"
            book["chars"] = json.loads(chars.read_text("utf-8")) if chars.exists() else {}
            book.setdefault("aliases", {})
            book.setdefault("width", 16), book.setdefault("height", 16)
            self._icons[style] = book
        return self._icons[style]


def captions(label: str, style: str) -> list[str]:
    """What a picture may be called while training; the default style also goes unnamed."""
    named = [f"{label}, {style} style", f"{style} style {label}"]
    return named if style != DEFAULT_STYLE else [label, label, f"a picture of {label}", *named]


def read_things(path: Path) -> list[str]:
    """Labels from a list with `#` comments."""
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _order(entry: dict) -> int:
    return entry.get("order", 1 << 30)


def _names(thing: Thing, chars: dict[str, str]) -> list[str]:
    codes = (thing.code, thing.code.replace("-fe0f", ""))
    return [chars[c] for c in codes if c in chars] + [thing.slug]


def _rasterise(svg: str) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    with Image.open(BytesIO(bytes(png))) as picture:
        return _on_white(picture.convert("RGBA"))


def _on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")
