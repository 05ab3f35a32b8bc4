"""`lora-diffusion generate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli.options import (
    Adapters,
    Base,
    Device,
    Guidance,
    Negative,
    Quantize,
    Size,
    Steps,
    parse_adapter,
    parse_size,
    refuse_existing,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    base: Base = None,
    adapter: Adapters = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file; further pictures get -2, -3, …")] = Path(
        "picture.png"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures to draw.")] = 1,
    steps: Steps = 30,
    guidance: Guidance = 5.0,
    size: Size = None,
    negative: Negative = None,
    quantize: Quantize = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Draw pictures with any number of weighted adapters.

    Example: `lora-diffusion generate "red apple" -a ink.safetensors:0.8 -a kiki.safetensors:0.5 -o apple.png`
    """
    weighted = [parse_adapter(text) for text in adapter or []]
    pixels = parse_size(size)
    files = [out if i == 0 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]
    for file in files:
        refuse_existing(file, overwrite)

    from lora_diffusion.cli.progress import bar, say
    from lora_diffusion.generating import Drawing, draw, recipe, save_picture
    from lora_diffusion.pipelines import load_for_drawing
    from lora_diffusion.quickstart import find_samples
    from lora_diffusion.stack import AdapterStack

    base = base or str(find_samples(None) / "base")
    opened = load_for_drawing(base, quantize, device)
    how = Drawing(steps, guidance, pixels, negative)
    seeds = [seed + i for i in range(count)]
    with AdapterStack(opened.pipe) as stack, bar() as progress:
        for path, weight in weighted:
            stack.add(path, weight)
        task = progress.add_task("drawing", total=count, note="")
        pictures = draw(opened.pipe, [prompt] * count, seeds, how, lambda n: progress.update(task, completed=n))
        for picture, file, used in zip(pictures, files, seeds, strict=True):
            save_picture(picture, file, recipe(prompt, used, how, base, quantize, stack))
    say("\n".join(map(str, files)))
