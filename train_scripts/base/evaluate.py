"""The gate of the base model: are the things it draws the things it was asked for?

    python train_scripts/base/evaluate.py --work ~/base-work [--base samples/base] [--seeds 3] [--every 1]

Draws every listed thing by its bare label (20 DDIM steps, guidance 1.3), ranks the true pictures of all
listed things by their similarity to what was drawn, and compares colours. The ceiling is the VAE's own
reconstruction of the true pictures put through the same measures. Prints a table, writes
`BASE/scores.json`; exits 0 if the gate is passed, 1 if not. `--every 4` takes every fourth thing and
one in `--styles`: for a look at a running training, never for the gate, which then counts as not passed.
Drawings are kept in `WORK/drawn/`, by the hash of the weights, so that a stopped evaluation goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from denoiser import GUIDANCE, STEPS
from diffusers import AutoencoderKL, StableDiffusionPipeline
from icons import BASE_STYLES, DEFAULT_STYLE, read_things
from retrieval import colour_distance, load_network, network_features, pixel_features, ranks
from torch import Tensor, nn

BATCH = 32
TOP1, TOP5, COLOUR = 0.60, 0.85, 1.5  # the gate; not to be lowered
PROMPTS, SEEDS = 300, 3  # the gate needs at least so many


@dataclass(frozen=True)
class Scores:
    """One row of the table; shares of 1, colour in histogram L1 (0 to 2)."""

    row: str
    pictures: int
    top1: float
    top5: float
    pixels_top1: float
    pixels_top5: float
    colour: float


class Judge:
    """Scores drawings of one style against its true pictures."""

    def __init__(self, network: nn.Module, true: Tensor) -> None:
        self.network, self.true = network, true
        self.gallery = network_features(network, true), pixel_features(true)

    def score(self, row: str, drawn: Tensor, answers: Tensor) -> Scores:
        """`drawn[i]` should be `true[answers[i]]`."""
        seen = ranks(network_features(self.network, drawn), self.gallery[0], answers)
        pixels = ranks(pixel_features(drawn), self.gallery[1], answers)
        shares = [(place < most).float().mean().item() for place in (seen, pixels) for most in (1, 5)]
        return Scores(row, len(drawn), *shares, colour_distance(drawn, self.true[answers]).mean().item())


def true_pictures(work: Path, style: str) -> tuple[list[str], Tensor]:
    """Labels and true pictures of the listed things in one style."""
    rows = np.load(work / "pictures.npz")
    chosen = rows["listed"] & (rows["styles"] == style)
    return rows["labels"][chosen].tolist(), torch.from_numpy(rows["pictures"][chosen]).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """What the VAE makes of the pictures: no drawing can come nearer."""
    parts = [vae.decode(vae.encode(p.float() / 127.5 - 1).latent_dist.mean).sample for p in pictures.split(64)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte()


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, folder: Path) -> Tensor:
    """(N, 3, 64, 64) uint8; a prompt's noise depends on the prompt and the seed alone. Kept in `folder`."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        file = folder / f"{zlib.crc32(json.dumps([seed, *batch]).encode()):08x}.npy"
        if not file.exists():
            random = [torch.Generator().manual_seed(zlib.crc32(f"{seed} {prompt}".encode())) for prompt in batch]
            drawn = pipeline(
                batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=random, output_type="np"
            )
            with file.with_suffix(".part").open("wb") as part:
                np.save(part, (drawn.images * 255).round().astype(np.uint8))
            file.with_suffix(".part").replace(file)
        parts.append(torch.from_numpy(np.load(file)))
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()


def open_base(base: Path, work: Path) -> tuple[StableDiffusionPipeline, Path]:
    """The pipeline, and the folder for its drawings."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    digest = hashlib.sha256()
    for file in sorted(base.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    settings = {"scheduler": dict(pipeline.scheduler.config), "steps": STEPS, "guidance": GUIDANCE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    folder = work / "drawn" / digest.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return pipeline, folder


def evaluate(base: Path, work: Path, seeds: int, every: int, style_every: int) -> list[Scores]:
    """The ceiling, the default style (over all seeds), and a part of the things in each other base style."""
    pipeline, folder = open_base(base, work)
    network = load_network()
    table = []
    for style in BASE_STYLES:
        labels, true = true_pictures(work, style)
        judge, told = Judge(network, true), len(table)
        default = style == DEFAULT_STYLE
        if default:
            table += ceilings(judge, pipeline, work)
        answers = torch.arange(0, len(labels), every if default else style_every)
        prompts = [labels[i] if default else f"{labels[i]}, {style} style" for i in answers.tolist()]
        rounds = range(seeds if default else 1)
        drawn = torch.cat([draw(pipeline, prompts, seed, folder) for seed in rounds])
        table.append(judge.score(style, drawn, answers.repeat(len(rounds))))
        print(*[_line(row) for row in table[told:]], sep="\n", flush=True)
    return table


def ceilings(judge: Judge, pipeline: StableDiffusionPipeline, work: Path) -> list[Scores]:
    """What the VAE itself makes of the true pictures; also before its decoder was trained again, where it was."""
    every = torch.arange(len(judge.true))
    table = [judge.score("VAE reconstruction", reconstruct(pipeline.vae, judge.true), every)]
    if (work / "vae.first").is_dir():
        first = AutoencoderKL.from_pretrained(work / "vae.first").eval()
        table.append(judge.score("VAE, first decoder", reconstruct(first, judge.true), every))
    return table


def passed(table: list[Scores], prompts: int, seeds: int) -> dict[str, bool]:
    """Each condition of the gate on the default style; the better of two VAEs is the ceiling."""
    ceiling = min((row for row in table if row.row.startswith("VAE")), key=lambda row: row.colour)
    ours = next(row for row in table if row.row == DEFAULT_STYLE)
    return {
        f"top-1 at least {TOP1:.0%}": ours.top1 >= TOP1,
        f"top-5 at least {TOP5:.0%}": ours.top5 >= TOP5,
        f"colour distance at most {COLOUR} x the VAE's": ours.colour <= COLOUR * ceiling.colour,
        f"at least {PROMPTS} prompts x {SEEDS} seeds": prompts >= PROMPTS and seeds >= SEEDS,
    }


def _line(row: Scores) -> str:
    shares = f"{row.top1:7.1%} {row.top5:7.1%} {row.pixels_top1:9.1%} {row.pixels_top5:9.1%}"
    return f"{row.row:20} {row.pictures:6} {shares} {row.colour:8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[2] / "samples" / "base")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--every", type=int, default=1, help="draw every so-manieth thing")
    parser.add_argument("--styles", type=int, default=4, help="the same for the styles beside the default one")
    args = parser.parse_args()
    print(f"{'':20} pictures  top-1   top-5  px top-1  px top-5   colour")
    table = evaluate(args.base, args.work, args.seeds, args.every, args.styles)
    prompts = next(row.pictures for row in table if row.row == DEFAULT_STYLE) // args.seeds
    gate = passed(table, prompts, args.seeds)
    things = len(read_things(Path(__file__).with_name("things.txt")))
    result = {"rows": [asdict(row) for row in table], "gate": gate, "gallery": things, "prompts": prompts}
    settings = {"seeds": args.seeds, "steps": STEPS, "guidance": GUIDANCE}
    (args.base / "scores.json").write_text(json.dumps(result | settings, indent=2) + "\n", "utf-8")
    for condition, holds in gate.items():
        print(f"{'yes' if holds else 'NO ':3} {condition}")
    raise SystemExit(0 if all(gate.values()) else 1)


if __name__ == "__main__":
    main()
