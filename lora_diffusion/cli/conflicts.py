"""`lora-diffusion conflicts`"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli.options import BaseOfMerge, Overwrite, parse_adapter, refuse_existing


def conflicts(
    adapters: Annotated[list[str], typer.Argument(metavar="FILE", help="Two or more adapter files.")],
    picture: Annotated[
        Path | None, typer.Option("--picture", "-p", metavar="PNG", help="Draw overlaps and signs as a heat map too.")
    ] = None,
    base: BaseOfMerge = None,
    overwrite: Overwrite = False,
) -> None:
    """Where adapters get in each other's way, block by block, and weights that balance them.

    Example: `lora-diffusion conflicts ink.safetensors kiki.safetensors --picture conflicts.png`
    """
    paths = [parse_adapter(text)[0] for text in adapters]
    if picture is not None:
        refuse_existing(picture, overwrite, ".png")

    from rich.markup import escape
    from rich.table import Table

    from lora_diffusion.cli.progress import console, say
    from lora_diffusion.formats.files import load_adapter
    from lora_diffusion.merging import conflicts as find_conflicts
    from lora_diffusion.merging.picture import heat_map
    from lora_diffusion.sheet import write_picture

    found = find_conflicts([load_adapter(path) for path in paths], base)
    for pair, rows in groupby(found, key=lambda row: (row.first, row.second)):
        heads = ("component", "block", "columns", "rows", "signs", "norms", "weights")
        table = Table(*heads, title=escape(" / ".join(pair)), title_justify="left")
        for row in rows:
            figures = (f"{row.columns:.2f}", f"{row.rows:.2f}", f"{row.signs:.2f}", f"{row.ratio:.2f}")
            table.add_row(row.component, row.block, *figures, f"{row.weights[0]:.2f} / {row.weights[1]:.2f}")
        console.print(table)
    if not found:
        say("no layer in common: they cannot get in each other's way" + (f"; {picture} not drawn" if picture else ""))
    elif picture is not None:
        write_picture(heat_map(found), picture)
        say(str(picture))
