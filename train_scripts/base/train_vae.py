"""Train the base model's VAE (64x64 RGB -> 8 x 16x16 latents) on the base styles' icons.

    python train_scripts/base/train_vae.py --work ~/base-work [--minutes 30]

First on 32x32 crops (four times cheaper), then on whole pictures. The loss is L1 on colour, on chroma
again (reds and greens are what small VAEs lose) and on edges, with a light KL. At the end the latents
are whitened: their mean and covariance over the data are folded into the 1x1 `quant_conv` and
`post_quant_conv`, so that `scaling_factor` is 1 and every latent channel has unit variance.
Writes `WORK/vae/` (Diffusers layout). Stops and resumes at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from resumable import Run, cosine
from torch import Tensor

CROPS, WHOLE = 84_000, 15_000  # samples in the two phases
CHROMA = torch.tensor([[0.5, -0.419, -0.081], [-0.169, -0.331, 0.5]])  # rows: Cr, Cb


def build() -> AutoencoderKL:
    """0.93 M parameters, 1.9 MB in fp16."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def load_pictures(work: Path, device: torch.device) -> Tensor:
    """All rendered pictures, (N, 3, 64, 64) uint8."""
    return torch.from_numpy(np.load(work / "pictures.npz")["pictures"]).permute(0, 3, 1, 2).contiguous().to(device)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on colour + chroma + horizontal and vertical differences, all in [-1, 1] units."""
    chroma = CHROMA.to(output)
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * torch.einsum("kc,bchw->bkhw", chroma, error).abs().mean() + 0.5 * edges


def sample_batch(pictures: Tensor, size: int, count: int, random: torch.Generator) -> Tensor:
    """`count` random crops of side `size`, half of them mirrored, float in [-1, 1]."""
    index = torch.randint(len(pictures), (count,), generator=random)
    top, left = (torch.randint(64 - size + 1, (count,), generator=random).tolist() for _ in range(2))
    crops = [pictures[i, :, t : t + size, s : s + size] for i, t, s in zip(index.tolist(), top, left, strict=True)]
    batch = torch.stack(crops).float() / 127.5 - 1
    mirrored = (torch.rand(count, generator=random) < 0.5).to(batch.device)
    return torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold z -> L^-1 (z - mean) into the encoder's last 1x1 convolution and its inverse into the decoder's first."""
    means = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pictures.split(64)])
    flat = means.permute(1, 0, 2, 3).flatten(1).double()
    mean, factor = flat.mean(1), torch.linalg.cholesky(torch.cov(flat))
    inverse = torch.linalg.inv(factor)
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    weight, bias = encode.weight.double().flatten(1), encode.bias.double()
    weight[:channels], bias[:channels] = inverse @ weight[:channels], inverse @ (bias[:channels] - mean)
    bias[channels:] += 2 * inverse.diagonal().log()  # the log-variance, its cross terms dropped
    encode.weight.copy_(weight.view_as(encode.weight)), encode.bias.copy_(bias)
    inner = decode.weight.double().flatten(1)
    decode.bias.copy_(decode.bias.double() + inner @ mean)
    decode.weight.copy_((inner @ factor).view_as(decode.weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (and save) after this long")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pictures = load_pictures(args.work, device)
    vae = build().to(device)
    total = CROPS + WHOLE
    run = Run(args.work / "vae.state", vae, lr=2e-3, samples=total, batch=32, rate=cosine(total))

    def loss_of(count: int, random: torch.Generator) -> Tensor:
        crops = run.seen < CROPS
        batch = sample_batch(pictures, 32 if crops else 64, count, random)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=random).to(device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return reconstruction_loss(output.float(), batch) + 1e-3 * kl

    if not run.train(loss_of, budget=args.minutes * 60):
        print("stopped before the end; the same command goes on")
        return
    run.use_average()
    vae.float().eval()
    with torch.no_grad():
        sample = pictures[torch.randperm(len(pictures), generator=run.random)[:256]]
        truth = sample.float() / 127.5 - 1
        mse = F.mse_loss(vae(truth).sample.clamp(-1, 1), truth) / 4
    whiten(vae, pictures)
    vae.save_pretrained(args.work / "vae")
    print(f"PSNR {-10 * mse.log10():.2f} dB; {run.seconds / 60:.0f} minutes on {device}")


if __name__ == "__main__":
    main()
