"""`lora-diffusion generate`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_diffusion.cli.options import (
    Adapters,
    Balance,
    Base,
    Compose,
    Device,
    Every,
    Guidance,
    Library,
    Negative,
    Overwrite,
    Quantize,
    Size,
    Steps,
    adapter_names,
    parse_adapter,
    parse_size,
    refuse_existing,
)
from lora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from lora_diffusion.composing import Composition
    from lora_diffusion.generating import Drawing, Order


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to draw; several make a batch, each with its own mix.")
    ] = None,
    base: Base = None,
    adapter: Adapters = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file; further pictures get -2, -3, …")] = Path(
        "picture.png"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures to draw of each prompt.")] = 1,
    steps: Steps = 30,
    guidance: Guidance = None,
    size: Size = None,
    negative: Negative = None,
    quantize: Quantize = None,
    compose: Compose = "sum",
    every: Every = 5,
    balance: Balance = False,
    device: Device = "auto",
    library: Library = Path("loras"),
    remake: Annotated[
        Path | None, typer.Option("--from", metavar="PICTURE", help="Make a picture that was drawn here again.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw pictures with any number of weighted adapters.

    Example: `lora-diffusion generate "red apple <lora:ink:0.8>" -a kiki.safetensors:0.5 -l styles -o apple.png`

    Example: `lora-diffusion generate "kiki, red apple" -a ink.safetensors -a kiki.safetensors --compose composite`

    Example: `lora-diffusion generate "apples" -a ink.safetensors:mask=0-0.5,0-1 -a clay.safetensors:0.7:mask=r.png`

    Example: `lora-diffusion generate --from apple.png -o again.png`
    """
    if bool(prompts) == bool(remake):
        raise ConfigError("generate: give prompts or --from PICTURE, one of the two")
    if remake is not None and (base or size or negative or quantize or guidance is not None or count > 1):
        raise ConfigError("generate: with --from the picture says what is drawn; leave base, size, guidance … away")
    weighted = [parse_adapter(text) for text in adapter or []]
    pixels = parse_size(size)
    total = len(prompts or [""]) * count
    files = [out if i == 0 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(total)]
    for file in files if prompts else [out]:
        refuse_existing(file, overwrite, ".png")

    from lora_diffusion.cli.progress import say
    from lora_diffusion.composing import Composition
    from lora_diffusion.generating import Drawing, Order, read_recipe, save_picture
    from lora_diffusion.library import Library, parse_prompts
    from lora_diffusion.quickstart import base_or_shipped

    if remake is not None:
        made = _again(read_recipe(remake), [path for path, _ in weighted], library, device)
        files = [out]
    else:
        shelf = Library(library)
        texts, tags = parse_prompts([prompt for prompt in prompts or [] for _ in range(count)], shelf)
        found = {name: shelf.find(name) for name in tags}
        order = Order(texts, [seed + i for i in range(total)], tags)
        base, guidance = base_or_shipped(base, guidance)
        how, model = Drawing(steps, guidance, pixels, negative), (base, quantize, device)
        made = _drawn(order, how, weighted, found, model, Composition(compose, every, balance))
    for (picture, said), file in zip(made, files, strict=True):
        save_picture(picture, file, said)
    say("\n".join(map(str, files)))


def _drawn(
    order: Order,
    how: Drawing,
    weighted: list[tuple[Path, Any]],
    found: dict[str, Path],
    model: tuple[str, Any, str],
    composition: Composition,
) -> list[tuple[Image.Image, dict[str, Any]]]:
    from dataclasses import asdict, replace

    from lora_diffusion.cli.progress import bar, say
    from lora_diffusion.generating import draw_order, missing_triggers
    from lora_diffusion.pipelines import load_for_drawing
    from lora_diffusion.stack import AdapterStack

    base, quantize, device = model
    opened = load_for_drawing(base, quantize, device)
    count = len(order.prompts)
    with AdapterStack(opened.pipe) as stack, bar() as progress:
        names = adapter_names([path for path, _ in weighted])
        fixed = {stack.add(path, name=n): weight for n, (path, weight) in zip(names, weighted, strict=True)}
        for name, path in found.items():
            stack.add(path, 0.0, name=name)
        stack.compose(**asdict(composition))
        order = replace(order, weights={**{n: [w] * count for n, w in fixed.items()}, **order.weights})
        for name, words in missing_triggers(stack, order.prompts).items():
            say(f"{name}: trained with {', '.join(words)}, which no prompt mentions")
        task = progress.add_task("drawing", total=count, note="")
        return draw_order(opened.pipe, stack, order, how, base, quantize, lambda n: progress.update(task, completed=n))


def _again(remake: Any, files: list[Path], library: Path, device: str) -> list[tuple[Image.Image, dict[str, Any]]]:
    from lora_diffusion.generating import add_again, draw_order
    from lora_diffusion.library import Library
    from lora_diffusion.pipelines import load_for_drawing
    from lora_diffusion.stack import AdapterStack

    opened = load_for_drawing(remake.base, remake.precision, device)
    candidates = [*files, *(Library(library).files if library.is_dir() else [])]
    with AdapterStack(opened.pipe) as stack:
        add_again(stack, remake, candidates)
        made = draw_order(opened.pipe, stack, remake.order, remake.how, remake.base, remake.precision)
    return [made[remake.index]]
