"""From folders to batches: look at everything, encode once, then let VAE and text encoders go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_diffusion.data.buckets import BucketRules, View, cut
from lora_diffusion.data.cache import TensorCache, content_key
from lora_diffusion.data.captions import CaptionRules, caption_variants
from lora_diffusion.data.pictures import open_mask, open_picture
from lora_diffusion.data.prepare import Item as Usable
from lora_diffusion.data.prepare import prepare as look_at
from lora_diffusion.errors import DataError
from lora_diffusion.families import Family
from lora_diffusion.pipelines import Opened
from lora_diffusion.quantize import fingerprint
from lora_diffusion.training.batches import Batches, Item, generator_for
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.sections import DataConfig

Count = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Prepared:
    """Batches to train on, batches to measure on, and a digest of pictures, captions and settings."""

    training: Batches
    heldout: Batches
    digest: str
    skipped: Mapping[Path, str]


def prepare(config: TrainConfig, opened: Opened, family: Family, listen: Count) -> Prepared:
    """Encode all pictures and captions (or take them from OUTPUT/cache); afterwards VAE and text encoders are gone.

    DataError lists everything that cannot be used before anything is encoded.
    """
    training, heldout, skipped = _examples(config, _bucket_rules(config.data, opened, family))
    encoder = _Encoder(config, opened, family)
    latents = encoder.latents([*training, *heldout], listen)
    table, rows = encoder.captions([*training, *heldout])
    _let_go(opened.pipe, family)
    loop, dropout = config.train, config.data.caption_dropout
    items = [
        [
            Item(
                str(usable.example.picture),
                latents[key],
                tuple(rows[caption] for caption in encoder.texts(usable)),
                usable.example.share / len(usable.views),
                _mask(usable, view, latents[key]),
                {"time_ids": torch.tensor(view.micro_conditioning)} if family.sized else {},
            )
            for usable in group
            for key, view in zip(encoder.keys(usable), usable.views, strict=True)
        ]
        for group in (training, heldout)
    ]
    digest = content_key(training=_contents(training), heldout=_contents(heldout))
    batches = Batches(items[0], table, size=loop.batch, seed=loop.seed, dropout=dropout)
    return Prepared(batches, Batches(items[1], table, size=loop.batch, seed=0), digest, skipped)


class _Encoder:
    """Latents and conditioning through the family's own pipeline, cached on disk under their contents' hash."""

    def __init__(self, config: TrainConfig, opened: Opened, family: Family) -> None:
        self.opened, self.family = opened, family
        self.rules = CaptionRules(trigger=config.data.trigger or None, dropout=config.data.caption_dropout)
        self.seed = config.train.seed
        self.cache = TensorCache(config.output / "cache")
        pipe, dtype = opened.pipe, str(opened.dtype)
        self.vae = f"{fingerprint(pipe.vae)}/{dtype}"
        parts = [getattr(pipe, name) for name in family.text_encoders]  # None where a pipeline was saved without it
        self.encoders = "/".join(fingerprint(part) if part is not None else "" for part in parts) + f"/{dtype}"

    def texts(self, usable: Usable) -> tuple[str, ...]:
        """The captions a picture is trained under."""
        return caption_variants(usable.example.caption, self.rules, seed=self.seed)

    def keys(self, usable: Usable) -> list[str]:
        """Cache keys of a picture's views."""
        return [content_key(kind="latents", of=usable.picture.content, view=v, model=self.vae) for v in usable.views]

    @torch.no_grad()
    def latents(self, group: Sequence[Usable], listen: Count) -> dict[str, Tensor]:
        """Cache key -> latents (channels, h, w)."""
        views = zip((key for usable in group for key in self.keys(usable)), _views(group), strict=True)
        wanted = dict(views)
        self.cache.fill(wanted, self._encode_pictures, batch=8, progress=listen)
        return {key: self.cache[key]["latents"] for key in wanted}

    @torch.no_grad()
    def captions(self, group: Sequence[Usable]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(conditioning table, caption -> row). Row 0 is the empty caption."""
        texts = ["", *sorted({text for usable in group for text in self.texts(usable)} - {""})]
        wanted = {content_key(kind="text", of=t, model=self.encoders, family=self.family.name): t for t in texts}
        self.cache.fill(wanted, self._encode_captions, batch=16)
        entries = [self.cache[key] for key in wanted]
        table = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
        return table, {text: row for row, text in enumerate(texts)}

    def _encode_pictures(self, wanted: Sequence[tuple[Path, View]]) -> list[dict[str, Tensor]]:
        made: list[dict[str, Tensor]] = []
        for path, view in wanted:
            pixels = np.asarray(cut(open_picture(path), view), dtype=np.float32) / 127.5 - 1
            picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            made.append({"latents": self.family.encode_pictures(self.opened.pipe, picture)[0]})
        return made

    def _encode_captions(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        encoded = self.family.encode_prompts(self.opened.pipe, list(texts))
        return [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]


def _examples(config: TrainConfig, rules: BucketRules) -> tuple[list[Usable], list[Usable], dict[Path, str]]:
    """(to train on, held out, left out with reasons)."""
    data, seed = config.data, config.train.seed
    found = look_at(data.folder, sizes=rules, skip_bad=data.skip_bad, seed=seed)
    training, skipped = list(found.items), dict(found.skipped)
    if isinstance(data.heldout, Path):
        apart = look_at(data.heldout, sizes=rules, skip_bad=data.skip_bad, seed=seed)
        inside = data.heldout.resolve()
        training = [item for item in training if not item.example.picture.resolve().is_relative_to(inside)]
        heldout, skipped = list(apart.items), skipped | dict(apart.skipped)
    else:
        order = torch.randperm(len(training), generator=generator_for(seed, "heldout split")).tolist()
        count = min(round(data.heldout * len(training)), len(training) - 1)
        chosen = set(order[:count])
        heldout = [item for i, item in enumerate(training) if i in chosen]
        training = [item for i, item in enumerate(training) if i not in chosen]
    if not training:
        raise DataError(f"{data.folder}: every picture is in the held-out folder; nothing is left to train on")
    return training, heldout, skipped


def _bucket_rules(data: DataConfig, opened: Opened, family: Family) -> BucketRules:
    config: Any = getattr(opened.pipe, family.denoiser).config
    stages = len(config.get("block_out_channels") or (1, 1))  # transformers take 2x2 patches
    step = int(opened.pipe.vae_scale_factor) * 2 ** (stages - 1)
    return BucketRules(resolutions=(data.resolution,), step=step, flip=data.flip, upscale=data.upscale)


def _views(group: Sequence[Usable]) -> list[tuple[Path, View]]:
    return [(usable.example.picture, view) for usable in group for view in usable.views]


def _contents(group: Sequence[Usable]) -> list[list[str]]:
    return [[usable.picture.content, usable.example.caption] for usable in group]


def _mask(usable: Usable, view: View, latents: Tensor) -> Tensor | None:
    """The picture's mask cut like the picture, averaged over each latent pixel: (h, w) in [0, 1]."""
    if usable.example.mask is None:
        return None
    mask = cut(open_mask(usable.example.mask, usable.picture.size), view)
    values = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)[None, None]
    return nn.functional.interpolate(values, size=latents.shape[-2:], mode="area")[0, 0]


def _let_go(pipe: Any, family: Family) -> None:
    for name in ("vae", *family.text_encoders):
        if isinstance(getattr(pipe, name, None), nn.Module):
            setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
