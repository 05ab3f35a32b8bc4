"""A contact sheet of what a base draws, each picture with the words it was asked by.

    python train_scripts/base/sheet.py --base samples/base --out contact.png [--count 72]

First the things by their bare labels, then six of them in the other base styles.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from denoiser import GUIDANCE, STEPS
from diffusers import StableDiffusionPipeline
from icons import BASE_STYLES, DEFAULT_STYLE, read_things
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, TEXT, COLUMNS = 64, 12, 22, 12  # pixels, and pictures in a row
STYLED = ("red apple", "cat face", "house", "rocket", "penguin", "woman cook")


def spread(things: list[str], count: int) -> list[str]:
    """`count` of them at even distances."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 0) -> list[Image.Image]:
    """One picture a prompt."""
    pictures = []
    for start in range(0, len(prompts), 24):
        batch = prompts[start : start + 24]
        random = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        pictures += pipeline(batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=random).images
    return pictures


def lay_out(pictures: list[Image.Image], texts: list[str]) -> Image.Image:
    """Rows of 12 with two lines of text under each picture."""
    width, height = SIDE + GAP, SIDE + TEXT + GAP // 2
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = GAP + (i % COLUMNS) * width, GAP + (i // COLUMNS) * height
        sheet.paste(picture, (left, top))
        lines = textwrap.wrap(text, 14)[:2]
        pen.multiline_text((left + SIDE / 2, top + SIDE), "\n".join(lines), "black", font, "ma", 1, "center")
    return sheet


def contact_sheet(base: Path, out: Path, count: int) -> None:
    """Draw and write the sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    things = spread(read_things(Path(__file__).with_name("things.txt")), count)
    styles = [style for style in BASE_STYLES if style != DEFAULT_STYLE]
    prompts = things + [f"{thing}, {style} style" for style in styles for thing in STYLED]
    lay_out(draw(pipeline, prompts), prompts).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[2] / "samples" / "base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=78)
    args = parser.parse_args()
    contact_sheet(args.base, args.out, args.count)


if __name__ == "__main__":
    main()
