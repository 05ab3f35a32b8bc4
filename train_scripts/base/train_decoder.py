"""Train the VAE's decoder to draw clean pictures from latents that are a little wrong.

    python train_scripts/base/train_decoder.py --work ~/base-work [--minutes 15]
    torchrun --nproc-per-node 2 train_scripts/base/train_decoder.py …      # two cores, OMP_NUM_THREADS=1

Run when the denoiser is trained. Its latents are never quite those of a true picture, and a decoder that
has only seen true ones turns small errors into blotches: white noise of 0.2 (latents have unit variance)
nearly doubles the colour distance. So a part of every batch are true latents, a part true latents with
white noise (as in arXiv 2510.11690), and a part latents that the denoiser drew, `DRAWS` of each listed
picture (kept in `WORK/drawn.DENOISER.*.pt`; the seeds are not those of `evaluate.py`); the decoder must always
draw the true picture. The encoder stays as it is, so the latents do too, and the denoiser goes on fitting.
Rewrites `WORK/vae/` at the end (the first one is kept as `WORK/vae.first/`); the state is
`WORK/decoder.DENOISER.state`: another denoiser, another run.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from denoiser import GUIDANCE, digest, open_pipeline
from diffusers import AutoencoderKL, StableDiffusionPipeline
from icons import DEFAULT_STYLE
from resumable import Run, cosine
from torch import Tensor
from train_denoiser import encode
from train_vae import load_pictures, reconstruction_loss

SAMPLES = 20_000
NOISY, DRAWN = 0.25, 0.375  # shares of the batch; the rest are true latents
MOST = 0.3  # standard deviation of the noise at most
DRAWS, STEPS, SEED = 2, 10, 7_000_000
BATCH = 32


@dataclass
class Pairs:
    """Latents, and the pictures that should come of them."""

    pictures: Tensor  # (N, 3, 64, 64) uint8
    latents: Tensor  # (N, 8, 16, 16), the encoder's
    drawn: Tensor  # (M, 8, 16, 16), the denoiser's
    answers: Tensor  # (M,): drawn[i] should be pictures[answers[i]]

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` latents and their pictures: true ones, noisy ones, drawn ones."""
        drawn, noisy = round(DRAWN * count), round(NOISY * count)
        index = torch.randint(len(self.pictures), (count - drawn,), generator=random).to(self.pictures.device)
        strength = MOST * torch.rand(count - drawn, generator=random)
        strength[noisy:] = 0
        noise = torch.randn((count - drawn, *self.latents.shape[1:]), generator=random)
        true = self.latents[index] + (strength[:, None, None, None] * noise).to(self.latents.device)
        ours = torch.randint(len(self.drawn), (drawn,), generator=random).to(self.pictures.device)
        return torch.cat([true, self.drawn[ours]]), self.pictures[torch.cat([index, self.answers[ours]])]


@torch.no_grad()
def draw_listed(work: Path, device: torch.device, rank: int, processes: int) -> tuple[Tensor, Tensor]:
    """Latents of every listed picture as the denoiser draws it, `DRAWS` times, and the pictures' rows.

    Each of several processes draws its part, and trains on that.
    """
    file = work / f"drawn.{digest(work)}.{rank + 1}of{processes}.pt"
    if not file.exists():
        rows = np.load(work / "pictures.npz")
        answers = np.tile(np.flatnonzero(rows["listed"]), DRAWS)[rank::processes]
        styles = ["" if style == DEFAULT_STYLE else f", {style} style" for style in rows["styles"][answers]]
        prompts = [label + style for label, style in zip(rows["labels"][answers], styles, strict=True)]
        drawn = draw(open_pipeline(work).to(device), prompts, SEED * (rank + 1))
        torch.save((drawn.cpu(), torch.from_numpy(answers)), file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    drawn, answers = torch.load(file, weights_only=True, map_location=device)
    return drawn, answers


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> Tensor:
    """(N, 8, 16, 16), one a prompt."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        random = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
        with torch.autocast(pipeline.device.type, torch.bfloat16):
            parts.append(pipeline(batch, generator=random, **settings).images.float())
        print(f"drawn {start + len(batch)} of {len(prompts)}", flush=True)
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="must stay the same when a run goes on")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (and save) after this long")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(device).eval()
    pictures = load_pictures(args.work, device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    parts = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    rate = cosine(args.samples)
    state = args.work / f"decoder.{digest(args.work)}.state"
    run = Run(state, parts, lr=1e-3, samples=args.samples, batch=BATCH, rate=rate, averaged=3_000)
    drawn = draw_listed(args.work, device, run.rank, run.processes)
    pairs = Pairs(pictures, encode(vae, pictures), *drawn)
    vae.train()

    def loss_of(count: int, random: torch.Generator) -> Tensor:
        latents, true = pairs.draw(count, random)
        with torch.autocast(device.type, torch.bfloat16):
            output = vae.decode(latents / vae.config.scaling_factor).sample
        return reconstruction_loss(output.float(), true.float() / 127.5 - 1)

    if not run.train(loss_of, budget=args.minutes * 60):
        print("stopped before the end; the same command goes on")
        return
    run.use_average()
    if run.rank == 0:
        if not (args.work / "vae.first").exists():
            shutil.copytree(args.work / "vae", args.work / "vae.first")
        vae.eval().save_pretrained(args.work / "vae")
        print(f"{run.seen} samples in {run.seconds / 60:.0f} minutes on {device}")


if __name__ == "__main__":
    main()
