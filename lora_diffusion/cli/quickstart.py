"""`lora-diffusion quickstart`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli.options import Settings


def quickstart(
    settings: Settings = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Another base model: Diffusers folder or hub id.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter and the grid.")] = Path("quickstart"),
    samples: Annotated[Path | None, typer.Option(help="The samples folder (default: the one that ships).")] = None,
) -> None:
    """Train a style over a 4-bit base model, blend it with a second adapter, and show what it does.

    Minutes on two CPU cores, with the small base model and the pictures that ship; a GPU is used where there is one.

    Example: `lora-diffusion quickstart`
    """
    from lora_diffusion.cli.progress import console, show_quickstart
    from lora_diffusion.quickstart import find_samples, plan

    console.print()
    show_quickstart(plan(find_samples(samples), out, base, settings or []))
