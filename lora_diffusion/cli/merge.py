"""`lora-diffusion merge`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli.options import BaseOfMerge, Format, Merging, Out, Overwrite, parse_adapter, refuse_existing


def merge(
    adapters: Merging,
    out: Out = Path("merged.safetensors"),
    method: Annotated[str, typer.Option(help="sum, slerp, ties, dare, della or prune.")] = "sum",
    base: BaseOfMerge = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank to write (default: exact for sum and slerp).")] = None,
    density: Annotated[float, typer.Option(help="Share of elements that ties, dare, della and prune keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="For dare and della.")] = 0,
    format: Format = "diffusers",
    overwrite: Overwrite = False,
) -> None:
    """One adapter file out of several: the true weighted sum of what they change, or another rule.

    Example: `lora-diffusion merge ink.safetensors:0.7 kiki.safetensors:unet=0.5:te=0 -o both.safetensors --rank 32`
    """
    weighted = [parse_adapter(text) for text in adapters]
    refuse_existing(out, overwrite)

    from lora_diffusion.cli.naming import named_alike, named_as
    from lora_diffusion.cli.progress import bar, say, saying_warnings
    from lora_diffusion.formats.files import load_adapter, save_adapter
    from lora_diffusion.merging import merge as merge_adapters

    loaded = [load_adapter(path) for path, _ in weighted]
    loaded = loaded if base else named_alike(loaded)
    with bar() as progress, saying_warnings():
        task = progress.add_task("merging", total=None, note="")
        merged = merge_adapters(
            loaded,
            [weight for _, weight in weighted],
            base=base,
            method=method,
            rank=rank,
            density=density,
            seed=seed,
            name=out.stem,
            listen=lambda done, of: progress.update(task, completed=done, total=of),
        )
    named = merged.adapter if base else named_as(merged.adapter, format, None)
    save_adapter(named, out, format=format, overwrite=overwrite)
    say(f"{out}: {named!r}, {merged.kept:.2%} of the energy kept")
