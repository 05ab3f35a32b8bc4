"""From folders to batches: look at everything, encode once, then let VAE and text encoders go."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor, nn

from lora_diffusion.data.buckets import BucketRules, View, cut
from lora_diffusion.data.cache import TensorCache, content_key
from lora_diffusion.data.captions import CaptionRules, caption_variants, named
from lora_diffusion.data.examples import Source
from lora_diffusion.data.pictures import PictureRules, open_mask, open_picture
from lora_diffusion.data.prepare import Item as Usable
from lora_diffusion.data.prepare import prepare as look_at
from lora_diffusion.errors import DataError
from lora_diffusion.families import Family
from lora_diffusion.pipelines import Opened, present
from lora_diffusion.quantize import fingerprint
from lora_diffusion.training.batches import Batches, Item, generator_for
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.priors import Count, class_folder
from lora_diffusion.training.sections import DataConfig
from lora_diffusion.training.watching import park


@dataclass(frozen=True)
class Prepared:
    """Batches to train on, batches to measure on, and a digest of pictures, captions and settings."""

    training: Batches
    heldout: Batches
    digest: str
    skipped: Mapping[Path | str, str]
    prior: Batches | None = None  # of class pictures, where `prior.kind` is "pictures"


def prepare(config: TrainConfig, opened: Opened, family: Family, listen: Count) -> Prepared:
    """Encode all pictures and captions (or take them from OUTPUT/cache); afterwards VAE and text encoders are gone.

    DataError lists everything that cannot be used before anything is encoded.
    """
    rules = _bucket_rules(config.data, opened, family)
    training, heldout, skipped = _examples(config, rules)
    classes = _class_pictures(config, opened, family, rules, listen)
    encoder = _Encoder(config, opened, family)
    everything = [*training, *heldout, *classes]
    latents = encoder.latents(everything, listen)
    texts = encoder.all_texts(everything)
    table: dict[str, Tensor] = {} if config.text.live else encoder.captions(texts)
    idle = ["vae", *(() if config.text.live else family.text_encoders)]
    (park if config.watch.prompts else _let_go)(opened.pipe, present(opened.pipe, idle))
    loop, made = config.train, _Items(encoder, latents, {text: row for row, text in enumerate(texts)})
    digests = {"training": _contents(training), "heldout": _contents(heldout)}
    digests |= {"prior": _contents(classes)} if classes else {}
    shared: dict[str, Any] = {"table": table, "size": loop.batch, "texts": texts}
    batches = Batches(made(training), seed=loop.seed, dropout=config.data.caption_dropout, **shared)
    prior = Batches(made(classes), seed=loop.seed, **shared) if classes else None
    return Prepared(batches, Batches(made(heldout), seed=0, **shared), content_key(**digests), skipped, prior)


class _Items:
    """Encoded pictures as the batches take them."""

    def __init__(self, encoder: _Encoder, latents: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
        self.encoder, self.latents, self.rows = encoder, latents, rows

    def __call__(self, group: Sequence[Usable]) -> list[Item]:
        """An item for every view of every picture."""
        return [
            self._item(usable, key, view)
            for usable in group
            for key, view in zip(self.encoder.keys(usable), usable.views, strict=True)
        ]

    def _item(self, usable: Usable, key: str, view: View) -> Item:
        example, latents = usable.example, self.latents[key]
        captions, plain = self.encoder.texts(usable), self.encoder.plain(usable)
        return Item(
            str(example.picture),
            latents,
            tuple(self.rows[caption] for caption in captions),
            example.share / len(usable.views),
            _mask(usable, view, latents),
            {"time_ids": torch.tensor(view.micro_conditioning)} if self.encoder.family.sized else {},
            tuple(self.rows[caption] for caption in plain),
        )


class _Encoder:
    """Latents and conditioning through the family's own pipeline, cached on disk under their contents' hash."""

    def __init__(self, config: TrainConfig, opened: Opened, family: Family) -> None:
        self.opened, self.family = opened, family
        self.rules, self.seed = _caption_rules(config.data), config.train.seed
        self.subject = config.prior.subject if config.prior.kind == "teacher" else None
        self.cache, self.looks = TensorCache(config.output / "cache"), _picture_rules(config.data)
        pipe, dtype = opened.pipe, str(opened.dtype)
        self.vae = content_key(weights=fingerprint(pipe.vae), settings=_settings_of(pipe.vae), dtype=dtype)
        parts = [getattr(pipe, name) for name in family.text_encoders]  # None where a pipeline was saved without it
        weights = [fingerprint(part) if part is not None else "" for part in parts]
        tokenizers = [_spelling_of(part) for name, part in pipe.components.items() if name.startswith("tokenizer")]
        self.encoders = content_key(weights=weights, tokenizers=tokenizers, dtype=dtype)

    def texts(self, usable: Usable) -> tuple[str, ...]:
        """The captions a picture is trained under; class pictures have theirs as they are."""
        if usable.example.regularisation:
            return (usable.example.caption,)
        return caption_variants(usable.example.caption, self.rules, seed=self.seed)

    def plain(self, usable: Usable) -> tuple[str, ...]:
        """The same captions with the class in place of the trigger, where a teacher hears them."""
        if self.subject is None or self.rules.trigger is None or usable.example.regularisation:
            return ()
        return tuple(named(text, self.rules.trigger, self.subject) for text in self.texts(usable))

    def keys(self, usable: Usable) -> list[str]:
        """Cache keys of a picture's views."""
        made_of = {"of": usable.picture.content, "on": self.looks.background, "model": self.vae}
        return [content_key(kind="latents", family=self.family.name, view=view, **made_of) for view in usable.views]

    @torch.no_grad()
    def latents(self, group: Sequence[Usable], listen: Count) -> dict[str, Tensor]:
        """Cache key -> latents (channels, h, w)."""
        wanted = {
            key: (usable.example.picture, view)
            for usable in group
            for key, view in zip(self.keys(usable), usable.views, strict=True)
        }
        self.cache.fill(wanted, self._encode_pictures, batch=8, progress=listen)
        return {key: self.cache[key]["latents"] for key in wanted}

    def all_texts(self, group: Sequence[Usable]) -> list[str]:
        """Every caption that is needed, the empty one first."""
        found = {text for usable in group for text in (*self.texts(usable), *self.plain(usable))}
        return ["", *sorted(found - {""})]

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The conditioning table: a row for each text."""
        wanted = {content_key(kind="text", of=t, model=self.encoders, family=self.family.name): t for t in texts}
        self.cache.fill(wanted, self._encode_captions, batch=16)
        entries = [self.cache[key] for key in wanted]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def _encode_pictures(self, wanted: Sequence[tuple[Path, View]]) -> list[dict[str, Tensor]]:
        made: list[dict[str, Tensor]] = []
        for path, view in wanted:
            pixels = np.asarray(cut(open_picture(path, self.looks), view), dtype=np.float32) / 127.5 - 1
            picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            made.append({"latents": self.family.encode_pictures(self.opened.pipe, picture)[0]})
        return made

    def _encode_captions(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        encoded = self.family.encode_prompts(self.opened.pipe, list(texts))
        return [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]


def _examples(config: TrainConfig, rules: BucketRules) -> tuple[list[Usable], list[Usable], dict[Path | str, str]]:
    """(to train on, held out, left out with reasons)."""
    data, seed = config.data, config.train.seed
    told: dict[str, Any] = {"caption_from": data.caption_from, "fallback_caption": data.fallback_caption}
    told |= {"sizes": rules, "pictures": _picture_rules(data), "skip_bad": data.skip_bad, "seed": seed}
    more = [Source(folder.folder, folder.weight, folder.repeats) for folder in data.folders]
    found = look_at([Source(data.folder), *more], **told)
    training, skipped = list(found.items), dict(found.skipped)
    if isinstance(data.heldout, Path):
        apart = look_at(data.heldout, **told)
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
    return training, [_unmirrored(item) for item in heldout], skipped


def _unmirrored(usable: Usable) -> Usable:
    """To measure on: the same pictures whether `data.flip` is set or not."""
    return replace(usable, views=tuple(view for view in usable.views if not view.flipped))


def _class_pictures(
    config: TrainConfig, opened: Opened, family: Family, rules: BucketRules, listen: Count
) -> list[Usable]:
    """What the prior is kept with: a folder's pictures or the base's own drawings."""
    if config.prior.kind != "pictures":
        return []
    folder = class_folder(config, opened, family, listen)
    sources = [Source(folder, regularisation=True)]
    caption = config.prior.subject or None
    found = look_at(sources, sizes=rules, fallback_caption=caption, skip_bad=config.data.skip_bad)
    drawn = {f"{number:04d}.png" for number in range(config.prior.pictures)}  # there may be more from another time
    return [item for item in found.items if config.prior.folder is not None or item.example.picture.name in drawn]


def _picture_rules(data: DataConfig) -> PictureRules:
    red, green, blue = ImageColor.getrgb(data.background)[:3]
    return PictureRules(background=(red, green, blue))


def _settings_of(model: Any) -> dict[str, Any]:
    """A model's configuration without where it came from."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def _spelling_of(tokenizer: Any) -> str:
    """What a tokenizer makes of a text depends on these."""
    if tokenizer is None:
        return ""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    table = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    return content_key(table=table, length=tokenizer.model_max_length, chat=getattr(tokenizer, "chat_template", None))


def _caption_rules(data: DataConfig) -> CaptionRules:
    return CaptionRules(
        trigger=data.trigger or None,
        shuffle=data.shuffle,
        keep_tokens=data.keep_tokens,
        dropout=data.caption_dropout,
        variants=data.caption_variants,
    )


def _bucket_rules(data: DataConfig, opened: Opened, family: Family) -> BucketRules:
    config: Any = getattr(opened.pipe, family.denoiser).config
    stages = len(config.get("block_out_channels") or (1, 1))  # transformers take 2x2 patches
    step = int(opened.pipe.vae_scale_factor) * 2 ** (stages - 1)
    return BucketRules(
        resolutions=(data.resolution, *data.resolutions),
        step=step,
        max_aspect=data.max_aspect,
        upscale=data.upscale,
        crop=data.crop,
        crops=data.crops,
        flip=data.flip,
    )


def _contents(group: Sequence[Usable]) -> list[list[str]]:
    return [[usable.picture.content, usable.example.caption] for usable in group]


def _mask(usable: Usable, view: View, latents: Tensor) -> Tensor | None:
    """The picture's mask cut like the picture, averaged over each latent pixel: (h, w) in [0, 1]."""
    if usable.example.mask is None:
        return None
    mask = cut(open_mask(usable.example.mask, usable.picture.size), view)
    values = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)[None, None]
    return nn.functional.interpolate(values, size=latents.shape[-2:], mode="area")[0, 0]


def _let_go(pipe: Any, parts: Sequence[str]) -> None:
    for name in parts:
        setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
