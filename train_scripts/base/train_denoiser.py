"""Train the base model's U-Net and text encoder on the listed things in the four base styles.

    python train_scripts/base/train_denoiser.py --work ~/base-work --samples 400000 [--minutes 90]
    torchrun --nproc-per-node 2 train_scripts/base/train_denoiser.py …      # two cores, OMP_NUM_THREADS=1
    … --samples 4000000 --cool 800000 --batch 256                           # a GPU

Goes on from `WORK/denoiser.state` with the same command; a larger `--samples` prolongs the run (the
rate is constant). `--cool N` brings the rate down over the last N samples, for the model that ships;
the state from before is kept as `WORK/denoiser.warm.state`: rename it to go on at the full rate.
`--start samples/base` begins a fresh run from exported weights, for want of a state.
Pictures are encoded once by `WORK/vae`; `export.py` makes a pipeline of any state.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from denoiser import build_denoiser, build_scheduler, train_tokenizer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from icons import DEFAULT_STYLE, captions
from resumable import Run, steady
from torch import Tensor, nn
from train_vae import load_pictures
from transformers import CLIPTokenizer

EMPTY_SHARE = 0.1  # of the captions are empty: what guidance points away from


@dataclass
class Examples:
    """Encoded pictures, and the token rows of all that each may be called."""

    latents: Tensor  # (N, 8, 16, 16)
    weights: Tensor  # (N,), how often each is drawn
    tokens: Tensor  # (C, 24)
    called: list[list[int]]  # picture -> its rows of `tokens`
    empty: Tensor  # (24,)

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` latents and their captions' tokens."""
        picked = torch.multinomial(self.weights, count, replacement=True, generator=random)
        which = torch.rand(count, generator=random).tolist()
        rows = [self.called[i][int(w * len(self.called[i]))] for i, w in zip(picked.tolist(), which, strict=True)]
        tokens = self.tokens[rows].clone()
        tokens[torch.rand(count, generator=random) < EMPTY_SHARE] = self.empty
        return self.latents[picked], tokens


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Posterior means times the scaling factor, (N, 8, 16, 16)."""
    means = [vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pictures.split(64)]
    return torch.cat(means) * vae.config.scaling_factor


def open_tokenizer(work: Path, labels: list[str], styles: list[str]) -> CLIPTokenizer:
    """The run's tokenizer, learned the first time from the captions of all things, listed or not."""
    if not (work / "tokenizer").is_dir():
        texts = sorted({c for pair in zip(labels, styles, strict=True) for c in captions(*pair)})
        train_tokenizer(texts).save_pretrained(work / "tokenizer")
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def load_examples(work: Path, device: torch.device, default_share: float) -> tuple[Examples, CLIPTokenizer]:
    """The listed things of `WORK/pictures.npz`, encoded and tokenised."""
    rows = np.load(work / "pictures.npz")
    tokenizer = open_tokenizer(work, rows["labels"].tolist(), rows["styles"].tolist())
    listed = torch.from_numpy(rows["listed"])
    labels, styles = rows["labels"][rows["listed"]].tolist(), rows["styles"][rows["listed"]].tolist()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    latents = encode(vae, load_pictures(work, device)[listed.to(device)])
    default = torch.tensor([style == DEFAULT_STYLE for style in styles])
    weights = torch.where(default, default_share / default.sum(), (1 - default_share) / (~default).sum())
    names = [captions(*pair) for pair in zip(labels, styles, strict=True)]
    flat = ["", *(name for row in names for name in row)]
    tokens = torch.tensor(tokenizer(flat, padding="max_length", truncation=True).input_ids).to(device)
    ends = np.cumsum([1, *map(len, names)]).tolist()
    called = [list(range(a, b)) for a, b in pairwise(ends)]
    return Examples(latents, weights, tokens, called, tokens[0]), tokenizer


def velocity_loss(
    parts: nn.ModuleDict, latents: Tensor, tokens: Tensor, alphas: Tensor, random: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted velocity sqrt(a) noise - sqrt(1 - a) latents, every step equally likely."""
    count, device = len(latents), latents.device
    steps = torch.randint(len(alphas), (count,), generator=random).to(device)
    noise = torch.randn(latents.shape, generator=random).to(device)
    signal = alphas[steps].sqrt()[:, None, None, None]
    sigma = (1 - alphas[steps]).sqrt()[:, None, None, None]
    with torch.autocast(device.type, torch.bfloat16):
        text = parts["text_encoder"](tokens).last_hidden_state
        guess = parts["unet"](signal * latents + sigma * noise, steps, text).sample
    return F.mse_loss(guess.float(), signal * noise - sigma * latents)


def borrow(base: Path, work: Path) -> None:
    """The exported base's VAE and tokenizer: its U-Net knows no others."""
    for part in ("vae", "tokenizer"):
        shutil.copytree(base / part, work / part, dirs_exist_ok=True)


def load_weights(parts: nn.ModuleDict, base: Path) -> None:
    """The exported weights into the U-Net and the text encoder."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    for name, part in parts.items():
        part.load_state_dict(getattr(pipeline, name).state_dict())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--samples", type=int, default=400_000, help="samples to have seen at the end, all calls together"
    )
    parser.add_argument("--cool", type=int, default=0, help="bring the rate down over the last so many samples")
    parser.add_argument("--default-share", type=float, default=0.43, help="share of samples of the default style")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--start", type=Path, help="exported base to begin from where WORK has no state")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (and save) after this long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)  # the same fresh weights in every process
    fresh = not (args.work / "denoiser.state").exists()
    if args.start and fresh:
        borrow(args.start, args.work)
    examples, tokenizer = load_examples(args.work, device, args.default_share)
    parts = build_denoiser(tokenizer).to(device)
    if args.start and fresh:
        load_weights(parts, args.start)
    alphas = build_scheduler().alphas_cumprod.to(device)
    warm = args.samples - args.cool
    rate = steady(args.samples, args.cool)
    run = Run(args.work / "denoiser.state", parts, lr=args.rate, samples=warm, batch=args.batch, rate=rate)
    end = time.monotonic() + args.minutes * 60

    def loss_of(count: int, random: torch.Generator) -> Tensor:
        return velocity_loss(parts, *examples.draw(count, random), alphas, random)

    if run.seen < warm and run.train(loss_of, end - time.monotonic()) and run.rank == 0:
        shutil.copyfile(run.path, args.work / "denoiser.warm.state")
    if run.seen >= warm:
        run.samples = args.samples
        run.train(loss_of, end - time.monotonic())
    if run.rank == 0:
        print(f"{run.seen} of {args.samples} samples in {run.seconds / 60:.0f} minutes on {device}")


if __name__ == "__main__":
    main()
