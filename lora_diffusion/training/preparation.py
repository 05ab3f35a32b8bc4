"""From a folder to batches: read, encode once, then let VAE and text encoders go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.families import Family
from lora_diffusion.pipelines import Opened
from lora_diffusion.training.batches import Batches, Item
from lora_diffusion.training.config import TrainConfig


@dataclass(frozen=True)
class Prepared:
    """Batches to train on, batches to measure on, and a digest of what they hold."""

    training: Batches
    heldout: Batches
    digest: str


def prepare(config: TrainConfig, opened: Opened, family: Family, listen: Callable[[int, int], None]) -> Prepared:
    """Encode all pictures and captions; afterwards VAE and text encoders are off the device."""
    training = _read(config.data.folder, config.data.resolution)
    heldout = _read(Path(config.data.heldout), config.data.resolution) if isinstance(config.data.heldout, Path) else []
    captions = ["", *sorted({c for _, c, _ in [*training, *heldout]})]
    rows = {caption: row for row, caption in enumerate(captions)}
    table = _encode_captions(opened, family, captions)

    def items(rs):
        return [Item(p.name, _encode_picture(opened, family, x), (rows[c],)) for p, c, x in rs]

    loop = config.train
    batches = Batches(items(training), table, size=loop.batch, seed=loop.seed, dropout=config.data.caption_dropout)
    return Prepared(batches, Batches(items(heldout), table, size=loop.batch, seed=0), "x")


def _read(folder: Path, size: int):
    out = []
    for p in sorted(folder.glob("*.png")):
        t = p.with_suffix(".txt")
        x = np.asarray(Image.open(p).convert("RGB").resize((size, size)))
        out.append((p, t.read_text().strip(), torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1))
    return out


@torch.no_grad()
def _encode_captions(opened: Opened, family: Family, captions: Sequence[str]) -> dict[str, Tensor]:
    parts = [family.encode_prompts(opened.pipe, list(captions[i : i + 32])) for i in range(0, len(captions), 32)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


@torch.no_grad()
def _encode_picture(opened: Opened, family: Family, picture: Tensor) -> Tensor:
    return family.encode_pictures(opened.pipe, picture)[0].cpu()
