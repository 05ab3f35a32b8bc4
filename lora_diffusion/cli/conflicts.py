"""`lora-diffusion conflicts`"""

from __future__ import annotations

from typing import Annotated

import typer

from lora_diffusion.cli.options import parse_adapter


def conflicts(
    adapters: Annotated[list[str], typer.Argument(metavar="FILE FILE...", help="Two or more adapter files.")],
) -> None:
    """Where adapters get in each other's way, block by block, and weights that balance them.

    Example: `lora-diffusion conflicts ink.safetensors kiki.safetensors`
    """
    paths = [parse_adapter(text)[0] for text in adapters]

    from rich.table import Table

    from lora_diffusion.cli.progress import console
    from lora_diffusion.formats.files import load_adapter
    from lora_diffusion.merging import conflicts as find_conflicts

    table = Table("adapters", "component", "block", "columns", "rows", "signs", "norms", "weights")
    for row in find_conflicts([load_adapter(path) for path in paths]):
        figures = (f"{row.columns:.2f}", f"{row.rows:.2f}", f"{row.signs:.2f}", f"{row.ratio:.2f}")
        weights = f"{row.weights[0]:.2f} / {row.weights[1]:.2f}"
        table.add_row(f"{row.first} / {row.second}", row.component, row.block, *figures, weights)
    console.print(table)
