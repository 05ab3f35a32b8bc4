"""Write the base's model card: `BASE/README.md` with the numbers of `BASE/scores.json`, and `BASE/contact.png`.

    python train_scripts/base/card.py --work ~/base-work [--base samples/base] --device "2 CPU cores"

Run after `export.py` and `evaluate.py`. A missed gate is said as plainly as a passed one.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from denoiser import digest
from evaluate import COLOUR, PROMPTS, SEEDS, TOP1, TOP5
from icons import BASE_STYLES, SETS
from sheet import contact_sheet

CREDITS = {
    "noto": ("Noto Emoji, Copyright 2013 Google, Inc.", "Apache-2.0"),
    "blob": ("Noto Emoji of 2017, Copyright 2013 Google, Inc.", "Apache-2.0"),
    "flat": ("Fluent Emoji, (c) Microsoft Corporation", "MIT"),
    "classic": ("EmojiTwo, originally Emojione 2.2 by Ranks.com", "CC BY 4.0"),
}
PARTS = {
    "unet": "U-Net (64, 128), attention at 8x8, text also through FiLM",
    "text_encoder": "CLIP text encoder, 2 layers of 128, own BPE, 24 tokens",
    "vae": "AutoencoderKL (32, 64, 64), 8 whitened channels of 16x16, scaling factor 1",
}


def facts(work: Path) -> dict[str, float]:
    """Samples and hours of the three trainings, from their states, and the pictures there were."""
    names = "vae.state", f"decoder.{digest(work)}.state", "denoiser.state"
    vae, decoder, denoiser = (torch.load(work / name, weights_only=True, mmap=True) for name in names)
    rows = np.load(work / "pictures.npz")
    return {
        "vae_samples": vae["seen"],
        "vae_hours": vae["seconds"] / 3600,
        "decoder_samples": decoder["seen"],
        "decoder_hours": decoder["seconds"] / 3600,
        "samples": denoiser["seen"],
        "hours": denoiser["seconds"] / 3600,
        "vae_pictures": len(rows["labels"]),
        "pictures": int(rows["listed"].sum()),
    }


def data_table(work: Path) -> str:
    """One row a base style."""
    rows = np.load(work / "pictures.npz")
    lines = [
        "| style word | npm package | pictures listed (all, for the VAE) | artwork | licence |",
        "|---|---|---|---|---|",
    ]
    for style in BASE_STYLES:
        (package, version), (credit, licence) = SETS[style], CREDITS[style]
        ours = rows["styles"] == style
        counts = f"{int((ours & rows['listed']).sum())} ({int(ours.sum())})"
        lines.append(f"| {style} | `{package}` {version} | {counts} | {credit} | {licence} |")
    return "\n".join(lines)


def size_table(base: Path) -> str:
    """One row a part with weights, and the sum of all files."""
    lines = ["| part | what | fp16 |", "|---|---|---|"]
    for part, what in PARTS.items():
        size = sum(file.stat().st_size for file in (base / part).glob("*.safetensors"))
        lines.append(f"| `{part}` | {what} | {size / 1e6:.2f} MB |")
    total = sum(f.stat().st_size for f in base.rglob("*") if f.suffix in (".safetensors", ".json"))
    return "\n".join([*lines, f"| all | with tokenizer and configuration | {total / 1e6:.2f} MB |"])


def score_table(scores: dict) -> str:
    """One row a style, the ceiling first."""
    lines = [
        "| drawn | pictures | top-1 | top-5 | top-1, pixels | top-5, pixels | colour distance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in scores["rows"]:
        shares = " | ".join(f"{row[key]:.1%}" for key in ("top1", "top5", "pixels_top1", "pixels_top5"))
        lines.append(f"| {row['row']} | {row['pictures']} | {shares} | {row['colour']:.3f} |")
    return "\n".join(lines)


def gate_lines(scores: dict) -> str:
    """Each condition with its answer, and the verdict."""
    lines = [f"- {'**yes**' if holds else '**no**'}: {condition}" for condition, holds in scores["gate"].items()]
    verdict = "The gate is passed." if all(scores["gate"].values()) else "**The gate is not passed**: train on."
    return "\n".join([*lines, "", verdict])


def card(base: Path, work: Path, device: str, history: str) -> str:
    """The whole text, from the template `card.md`."""
    scores = json.loads((base / "scores.json").read_text("utf-8"))
    tables = {
        "data": data_table(work),
        "sizes": size_table(base),
        "scores": score_table(scores),
        "gate": gate_lines(scores),
    }
    gate = {"top1": TOP1, "top5": TOP5, "colour": COLOUR, "least_prompts": PROMPTS, "least_seeds": SEEDS}
    template = Path(__file__).with_name("card.md").read_text("utf-8")
    return template.format(**(scores | tables | gate | facts(work)), device=device, history=textwrap.fill(history, 118))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[2] / "samples" / "base")
    parser.add_argument("--device", required=True, help="what it was trained on, in words")
    parser.add_argument("--history", default="", help="how the rate and the data changed on the way, in a sentence")
    args = parser.parse_args()
    contact_sheet(args.base, args.base / "contact.png", 78)
    (args.base / "README.md").write_text(card(args.base, args.work, args.device, args.history), "utf-8")
    print(args.base / "README.md")


if __name__ == "__main__":
    main()
