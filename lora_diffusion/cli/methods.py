"""`lora-diffusion methods`"""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Pipeline folder: also count what each method trains on it.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="What is counted: a preset such as attention+ff, or a glob.")
    ] = "attention",
    rank: Annotated[int, typer.Option(min=1, help="Rank of what is counted.")] = 16,
) -> None:
    """List the methods that `adapter.method` of a training configuration can be, plugins included.

    Example: `lora-diffusion methods --base samples/base --rank 8`
    """
    from rich.console import Console
    from rich.table import Table

    from lora_diffusion.adapter import DENOISERS
    from lora_diffusion.families.skeletons import skeleton_of
    from lora_diffusion.inspection.methods import registered

    models = skeleton_of(base) if base else {}
    denoiser = next((models[name] for name in DENOISERS if name in models), None)
    table = Table("method", "tensors", *(["parameters"] if denoiser is not None else []), "what it is")
    for row in registered(denoiser, targets, rank):
        where = f" on {row.targets}" if row.targets != targets else ""
        counted = ["–" if row.parameters is None else f"{row.parameters:,}{where}"] if denoiser is not None else []
        table.add_row(row.name, ", ".join(row.tensors), *counted, row.about)
    Console().print(table)
