"""`lora-diffusion plan CONFIG.toml [key=value …]`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lora_diffusion.cli.options import Config, Settings
from lora_diffusion.sizes import GIB, size_of

if TYPE_CHECKING:
    from rich.table import Table

    from lora_diffusion.inspection.memory import MemoryPlan

ROWS = ("weights", "adapter", "gradients", "optimizer", "average", "activations", "peak")


def plan(
    config: Config,
    settings: Settings = None,
    gpu: Annotated[
        float | None, typer.Option(min=0.1, metavar="GIB", help="Memory of the GPU: say what to turn on to fit it.")
    ] = None,
) -> None:
    """Say what a run will take before it starts: parameters and peak memory of full training, LoRA and QLoRA.

    Reads layer shapes only, no weights, and rehearses one training step of each on torch's meta device.

    Example: `lora-diffusion plan style.toml --gpu 12`
    """
    from rich.console import Console

    from lora_diffusion.inspection.memory import RESERVE, encoding_with, plan_memory, ways_to_fit
    from lora_diffusion.training.config import TrainConfig

    console, read = Console(), TrainConfig.load(config, settings or [])
    on_gpu = True if gpu is not None else None
    made = plan_memory(read, gpu=on_gpu)
    console.print(_table(made))
    console.print(f"before training, while pictures and captions are encoded: {size_of(made.encoding)}")
    if made.report is not None:
        console.print(f"\nlayers of the denoiser, {made.report}\n", highlight=False, markup=False)
    if gpu is None:
        return
    limit = gpu * GIB - RESERVE
    into = f"into {gpu:g} GiB, of which CUDA and gaps take {size_of(RESERVE)}"
    if made.encoding > limit:
        console.print(f"encoding does not fit {into}")
    if made.encoding > limit and read.backbone.text_encoders is None:
        packed = encoding_with(read.changed("backbone.text_encoders=nf4"), made.waiting, gpu=on_gpu)
        console.print(f"  backbone.text_encoders=nf4  ->  {size_of(packed)}", highlight=False)
    if made.this_run.peak <= limit:
        console.print(f"training fits {into}")
        return
    steps = ways_to_fit(read, limit, gpu=on_gpu)
    console.print(f"training does not fit {into}; turn on:")
    for setting, cost in steps:
        console.print(f"  {setting}  ->  {size_of(cost.peak)}", highlight=False)
    if not steps or steps[-1][1].peak > limit:
        console.print("and even then it does not fit: a larger GPU or a smaller base is needed")


def _table(made: MemoryPlan) -> Table:
    from rich.table import Table

    title = f"{made.denoiser}, {made.parameters:,} parameters, computing in {made.dtype}"
    heads = [cost.name + (" (this run)" if cost is made.this_run else "") for cost in made.columns]
    table = Table("", *heads, title=title, title_justify="left")
    table.add_row("trained parameters", *(f"{cost.trained:,}" for cost in made.columns))
    for row in ROWS:
        table.add_row(row, *(size_of(getattr(cost, row)) for cost in made.columns))
    return table
