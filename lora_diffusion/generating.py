"""Drawing pictures: one seed a picture, and a recipe in each by which it can be made again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from lora_diffusion.composing import Composition
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.files import load_adapter
from lora_diffusion.formats.identity import trigger_words
from lora_diffusion.gates import read_weight, spell_weight
from lora_diffusion.library import by_image
from lora_diffusion.sheet import write_picture
from lora_diffusion.stack import AdapterStack

RECIPE = "lora_diffusion"  # the PNG text chunk that says how a picture was made


@dataclass(frozen=True)
class Drawing:
    """How to draw. `guidance` None and `size` None: the pipeline's own; `extra` goes to the pipeline as it is."""

    steps: int = 30
    guidance: float | None = None
    size: tuple[int, int] | None = None  # width, height
    negative: str | None = None
    batch: int = 8
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """Pictures to draw: a prompt and a seed each, and each adapter's weight for each of them."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    weights: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def part(self, start: int, count: int) -> Order:
        """The pictures from `start` on."""
        to = start + count
        weights = {name: row[start:to] for name, row in self.weights.items()}
        return Order(self.prompts[start:to], self.seeds[start:to], weights)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Drawing = Drawing(),
    listen: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """One picture for each (prompt, seed). `listen` hears how many are done after each batch."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), how.batch):
        batch = list(prompts[start : start + how.batch])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + how.batch]]
        with torch.inference_mode():
            pictures += pipe(batch, generator=generators, **_arguments(pipe, how, len(batch))).images
        listen(len(pictures))
    return pictures


def reconstructed(pipe: Any, pictures: Sequence[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    """Pictures as the pipeline's own VAE gives them back at (width, height): what no drawing can be sharper than.

    Unchanged where the VAE is none of the common kind (`AutoencoderKL`).
    """
    from diffusers import AutoencoderKL  # here, because it takes seconds

    vae: Any = pipe.vae
    if not isinstance(vae, AutoencoderKL):
        return list(pictures)
    vae = cast("Any", vae)
    drawn: list[Image.Image] = []
    for start in range(0, len(pictures), 16):
        given = pipe.image_processor.preprocess(list(pictures[start : start + 16]), *reversed(size))
        with torch.inference_mode():
            latents = vae.encode(given.to(vae.device, vae.dtype)).latent_dist.mode()
            drawn += pipe.image_processor.postprocess(vae.decode(latents).sample, "pil")
    return drawn


def draw_order(
    pipe: Any,
    stack: AdapterStack,
    order: Order,
    how: Drawing,
    base: str,
    precision: str | None,
    listen: Callable[[int], None] = lambda done: None,
) -> list[tuple[Image.Image, dict[str, Any]]]:
    """(picture, recipe) for each of the order, every picture with its own mix of the stack's adapters."""
    made: list[tuple[Image.Image, dict[str, Any]]] = []
    parts = [order.part(start, how.batch) for start in range(0, len(order.prompts), how.batch)]
    said = [recipes(part, how, base, precision, stack) for part in parts]  # refuses before work
    for part, each in zip(parts, said, strict=True):
        stack.weigh_all(by_image(part.weights))
        made += zip(draw(pipe, part.prompts, part.seeds, how), each, strict=True)
        listen(len(made))
    return made


def missing_triggers(stack: AdapterStack, prompts: str | Sequence[str]) -> dict[str, list[str]]:
    """Adapter -> the words that call it, for those of which no prompt has one as a word of its own, in any case.

    Words are what a file declares as its trigger phrase and the tokens it carries; one that has neither is not named.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    missing: dict[str, list[str]] = {}
    for name in stack:
        adapter = stack[name]
        declared = trigger_words(adapter.metadata) if "modelspec.trigger_phrase" in adapter.metadata else []
        words = list(dict.fromkeys([*declared, *adapter.embeddings]))
        found = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in words]
        if words and not any(re.search(word, text, re.IGNORECASE) for word in found for text in texts):
            missing[name] = words
    return missing


def _arguments(pipe: Any, how: Drawing, count: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_inference_steps": how.steps, **how.extra}
    if how.guidance is not None:
        arguments["guidance_scale"] = how.guidance
    if how.size is not None:
        multiple = getattr(pipe, "vae_scale_factor", 8)
        if any(side % multiple for side in how.size):
            raise ConfigError(f"size {how.size[0]}x{how.size[1]}: both sides must be multiples of {multiple} here")
        arguments |= {"width": how.size[0], "height": how.size[1]}
    if how.negative is not None:
        arguments["negative_prompt"] = [how.negative] * count
    return arguments


def recipes(order: Order, how: Drawing, base: str, precision: str | None, stack: AdapterStack) -> list[dict[str, Any]]:
    """How each picture of one batch was made, as JSON can say it; adapters by content hash.

    Each holds the whole batch: the last bits of a picture can depend on what is drawn beside it. Masks are in it as
    pictures, each once, by the hash of their pixels.
    """
    adapters: list[dict[str, Any]] = []
    masks: dict[str, str] = {}
    for name in stack:
        adapter, row = stack[name], order.weights.get(name, [stack.weights[name]] * len(order.seeds))
        said: dict[str, Any] = {"name": name, "file": str(adapter.source or ""), "sha256": stack.content_hash(name)}
        adapters.append({**said, "weights": [spell_weight(one, masks) for one in row]})
    sampling = {"steps": how.steps, "guidance": how.guidance, "size": how.size, "negative": how.negative}
    drawing = {"base": base, "precision": precision, **sampling}
    batch = {"prompts": list(order.prompts), "seeds": list(order.seeds)}
    return [
        {
            "prompt": order.prompts[index],
            "seed": order.seeds[index],
            **drawing,
            "compose": asdict(stack.composition),
            "adapters": [{**one, "weight": one["weights"][index]} for one in adapters],
            "masks": masks,
            "batch": {"index": index, **batch},
        }
        for index in range(len(order.prompts))
    ]


def save_picture(picture: Image.Image, path: Path, made: dict[str, Any]) -> None:
    """Write a PNG that carries its recipe."""
    write_picture(picture, path, {RECIPE: json.dumps(made, ensure_ascii=False, default=dict)})


@dataclass(frozen=True)
class Remake:
    """What a picture says about how it was made: enough to make it again."""

    order: Order
    index: int
    how: Drawing
    base: str
    precision: Any
    adapters: tuple[tuple[str, str, str], ...]  # name, file, content hash
    composition: Composition


def read_recipe(path: Path) -> Remake:
    """The recipe in a PNG. ConfigError for a picture without one, or with one that is not whole."""
    try:
        with Image.open(path) as picture:
            text = cast("dict[str, str]", getattr(picture, "text", {})).get(RECIPE)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as a picture: {error}") from None
    if text is None:
        raise ConfigError(f"{path} carries no recipe; only pictures that lora-diffusion drew do")
    try:
        return _remake(json.loads(text))
    except (ValueError, LookupError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: its recipe is not whole ({type(error).__name__}: {error})") from None


def _remake(made: dict[str, Any]) -> Remake:
    batch, adapters = made["batch"], made["adapters"]
    count = len(batch["prompts"])
    masks: dict[str, str] = made.get("masks", {})
    weights = {one["name"]: [read_weight(weight, masks) for weight in one["weights"]] for one in adapters}
    if len(batch["seeds"]) != count or any(len(row) != count for row in weights.values()):
        raise ValueError("prompts, seeds and weights are not as many")
    order = Order([str(p) for p in batch["prompts"]], [int(s) for s in batch["seeds"]], weights)
    size = None if made["size"] is None else (int(made["size"][0]), int(made["size"][1]))
    guidance = None if made["guidance"] is None else float(made["guidance"])
    how = Drawing(int(made["steps"]), guidance, size, made["negative"], batch=count)
    files = tuple((str(one["name"]), str(one["file"]), str(one["sha256"])) for one in adapters)
    return Remake(
        order, range(count)[int(batch["index"])], how, str(made["base"]), made["precision"], files, _composition(made)
    )


def _composition(made: Mapping[str, Any]) -> Composition:
    said: dict[str, Any] = made.get("compose", {})  # recipes of earlier versions have none
    return Composition(str(said.get("mode", "sum")), said.get("every", 5), bool(said.get("balance")))


def add_again(stack: AdapterStack, remake: Remake, candidates: Sequence[Path]) -> None:
    """Put the adapters of a recipe on, composed as then, each found by its content at its old place or in `candidates`.

    ConfigError for one that is nowhere.
    """
    stack.compose(**asdict(remake.composition))
    for name, file, sha256 in remake.adapters:
        likely = sorted(candidates, key=lambda path: path.stem != Path(file).stem)
        for path in [Path(file), *likely]:
            if path.is_file() and (adapter := load_adapter(path)).content_hash == sha256:
                stack.add(adapter, name=name)
                break
        else:
            where = f"neither {file} nor one of {len(candidates)} other files has its content ({sha256[:12]}…)"
            raise ConfigError(f"adapter {name!r} of the recipe: {where}; say where it is with --adapter or --library")
