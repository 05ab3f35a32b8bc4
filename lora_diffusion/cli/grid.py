"""`lora-diffusion grid`"""

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
from lora_diffusion.errors import ConfigError


def grid(
    prompts: Annotated[list[str], typer.Argument(help="One row each.")],
    base: Base = None,
    adapter: Adapters = None,
    weights: Annotated[str, typer.Option(help="One column each: factors on every adapter's weight.")] = "0,0.5,1",
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file.")] = Path("grid.png"),
    seed: Annotated[int, typer.Option(help="The same for every picture.")] = 0,
    steps: Steps = 30,
    guidance: Guidance = 5.0,
    size: Size = None,
    negative: Negative = None,
    quantize: Quantize = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """A labelled contact sheet: prompts down, strengths of the adapters across.

    Example: `lora-diffusion grid "red apple" "cat face" -a ink.safetensors --weights 0,0.4,0.8,1.2`
    """
    weighted = [parse_adapter(text) for text in adapter or []]
    pixels = parse_size(size)
    factors = _numbers(weights)
    refuse_existing(out, overwrite)

    from lora_diffusion.cli.progress import bar, say
    from lora_diffusion.generating import Drawing, draw
    from lora_diffusion.pipelines import load_for_drawing
    from lora_diffusion.quickstart import find_samples
    from lora_diffusion.sheet import contact_sheet
    from lora_diffusion.stack import AdapterStack

    base = base or str(find_samples(None) / "base")
    opened = load_for_drawing(base, quantize, device)
    how = Drawing(steps, guidance, pixels, negative)
    columns = []
    with AdapterStack(opened.pipe) as stack, bar() as progress:
        names = [(stack.add(path), weight) for path, weight in weighted]
        task = progress.add_task("drawing", total=len(factors) * len(prompts), note="")
        for factor in factors:
            for name, weight in names:
                stack.weigh(name, factor * weight)
            done = len(columns) * len(prompts)
            drawn = draw(
                opened.pipe,
                prompts,
                [seed] * len(prompts),
                how,
                lambda n, done=done: progress.update(task, completed=done + n),
            )
            columns.append(drawn)
    title = " + ".join(f"{path.stem} {weight:g}" for path, weight in weighted)
    heads = ["base" if factor == 0 else f"× {factor:g}" for factor in factors]
    contact_sheet(list(zip(*columns, strict=True)), prompts, heads, title=title).save(out)
    say(str(out))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text!r}: expected numbers with commas between them, such as 0,0.5,1") from None
