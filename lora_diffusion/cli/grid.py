"""`lora-diffusion grid`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli.options import (
    Adapters,
    Balance,
    Base,
    Compose,
    Device,
    Every,
    Guidance,
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


def grid(
    prompts: Annotated[list[str], typer.Argument(help="Prompts.")],
    base: Base = None,
    adapter: Adapters = None,
    columns: Annotated[str, typer.Option(help="What changes across: weight, adapter, prompt or seed.")] = "weight",
    rows: Annotated[str, typer.Option(help="What changes downwards: weight, adapter, prompt or seed.")] = "prompt",
    weights: Annotated[
        str, typer.Option(help="Factors on every adapter's weight; with schedules: 0;0.5;0@0,1@0.5.")
    ] = "0,0.5,1",
    seeds: Annotated[str, typer.Option("--seeds", "--seed", help="Seeds, with commas between them.")] = "0",
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file.")] = Path("grid.png"),
    steps: Steps = 30,
    guidance: Guidance = None,
    size: Size = None,
    negative: Negative = None,
    quantize: Quantize = None,
    compose: Compose = "sum",
    every: Every = 5,
    balance: Balance = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """A labelled contact sheet over two of weight (and schedule), adapter, prompt and seed.

    Example: `lora-diffusion grid "red apple" "cat face" -a ink.safetensors --weights 0,0.4,0.8,1.2`

    Example: `lora-diffusion grid "red apple" -a ink.safetensors -a kiki.safetensors --columns adapter --rows seed`
    """
    weighted = [parse_adapter(text) for text in adapter or []]
    names = adapter_names([path for path, _ in weighted])
    pixels = parse_size(size)
    refuse_existing(out, overwrite, ".png")

    from lora_diffusion.axes import Choices, grid_order, parse_factors
    from lora_diffusion.cli.progress import bar, say
    from lora_diffusion.gates import show_weight
    from lora_diffusion.generating import Drawing, draw_order
    from lora_diffusion.pipelines import load_for_drawing
    from lora_diffusion.quickstart import base_or_shipped
    from lora_diffusion.sheet import contact_sheet, write_picture
    from lora_diffusion.stack import AdapterStack

    numbers, factors = _seeds(seeds), parse_factors(weights)
    for axis in (columns, rows):
        if not Choices(prompts, numbers, {str(path): weight for path, weight in weighted}, factors).labels(axis):
            raise ConfigError(f"axis {axis!r} has nothing on it; name adapters with --adapter")
    base, guidance = base_or_shipped(base, guidance)
    opened = load_for_drawing(base, quantize, device)
    how = Drawing(steps, guidance, pixels, negative)
    with AdapterStack(opened.pipe) as stack, bar() as progress:
        chosen = {stack.add(path, name=n): weight for n, (path, weight) in zip(names, weighted, strict=True)}
        choices = Choices(prompts, numbers, chosen, factors)
        stack.compose(compose, every=every, balance=balance)
        order = grid_order(choices, columns, rows)
        task = progress.add_task("drawing", total=len(order.prompts), note="")
        made = draw_order(opened.pipe, stack, order, how, base, quantize, lambda n: progress.update(task, completed=n))
    across, down = choices.labels(columns), choices.labels(rows)
    pictures = [[made[r * len(across) + c][0] for c in range(len(across))] for r in range(len(down))]
    title = " + ".join(f"{name} {show_weight(weight)}" for name, weight in choices.adapters.items())
    write_picture(contact_sheet(pictures, down, across, title=title), out)
    say(str(out))


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r}: expected whole numbers with commas between them, such as 0,1,2") from None
