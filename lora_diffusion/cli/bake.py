"""`lora-diffusion bake`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_diffusion.cli.options import Base, Merging, parse_adapter


def bake(
    adapters: Merging,
    base: Base = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="New Diffusers folder to write.")] = Path("baked"),
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "nf4"] | None, typer.Option(help="Of the denoiser (default: the base's own).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write nf4 although most of the adapter is lost in it.")
    ] = False,
) -> None:
    """Write weighted adapters into a base model for good. Into nf4 only where 0.9 of what they change survives.

    Example: `lora-diffusion bake style.safetensors:0.8 -b base-model -o styled-model`
    """
    weighted = [parse_adapter(text) for text in adapters]

    from lora_diffusion.cli.progress import say
    from lora_diffusion.merging import bake as bake_into
    from lora_diffusion.quickstart import find_samples

    baked = bake_into(base or find_samples(None) / "base", weighted, out, precision=precision, force=force)
    survives = f", {baked.survival} survives" if baked.precision == "nf4" else ""
    say(f"{baked.folder}: {baked.precision}{survives}")
