"""Contact sheets: labelled rows and columns of pictures; and writing a picture so that nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lora_diffusion.drafts import whole_file
from lora_diffusion.errors import ConfigError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_INK, _PAPER, _FAINT = (24, 24, 28), (255, 255, 255), (110, 110, 120)


def write_picture(picture: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `texts` in it, whole or not at all.

    ConfigError where it cannot be written (a full disk, a folder); what was there before stays.
    """
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    try:
        with whole_file(path) as draft, draft.open("wb") as file:
            picture.save(file, "PNG", pnginfo=info)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from None


def contact_sheet(
    pictures: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    cell: int | None = None,
) -> Image.Image:
    """`pictures[row][column]` with labels, RGB. `cell`: pixels a picture is shown at (default: at least 128)."""
    size = pictures[0][0].size
    side = cell or max(128, max(size))
    scale = side / max(size)
    width, height = round(size[0] * scale), round(size[1] * scale)
    font, big = ImageFont.load_default(max(13, side // 9)), ImageFont.load_default(max(16, side // 7))
    line = round(_height(font) * 1.35)
    gap = max(4, side // 24)
    names = [_wrapped(name, font, side * 1.25) for name in rows]
    heads = [_wrapped(name, font, width) for name in columns]
    left = round(max((font.getlength(part) for name in names for part in name), default=0)) + 3 * gap
    top = (round(_height(big) * 2) if title else gap) + line * max(map(len, heads)) + gap
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((gap, gap), title, _INK, big)
    for column, head in enumerate(heads):
        for number, part in enumerate(reversed(head)):
            x = left + column * (width + gap) + (width - font.getlength(part)) / 2
            pen.text((x, top - gap - (number + 1) * line), part, _FAINT, font)
    for row, name in enumerate(names):
        y = top + row * (height + gap)
        for number, part in enumerate(name):
            pen.text((gap, y + height / 2 + (number - len(name) / 2) * line), part, _INK, font)
        for column, picture in enumerate(pictures[row]):
            shown = picture.convert("RGB").resize((width, height), _resampling(scale))
            sheet.paste(shown, (left + column * (width + gap), y))
    return sheet


def _resampling(scale: float) -> Image.Resampling:
    return Image.Resampling.NEAREST if scale >= 1 and scale == round(scale) else Image.Resampling.LANCZOS


def _height(font: Font) -> float:
    return font.getbbox("Ag")[3]


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], candidate] if font.getlength(candidate) <= width or not lines[-1] else [*lines, word]
    return lines
