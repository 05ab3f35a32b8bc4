"""`lora-diffusion resize`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli.options import BaseOfMerge, Format, Out, Overwrite, parse_adapter, refuse_existing


def resize(
    adapter: Annotated[str, typer.Argument(metavar="FILE", help="Adapter file.")],
    out: Out = Path("resized.safetensors"),
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer, or the most a layer gets.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of each layer's energy to keep, such as 0.95.")] = None,
    frobenius: Annotated[float | None, typer.Option(help="Share of each layer's norm to keep.")] = None,
    nested: Annotated[
        bool, typer.Option("--nested", help="Keep the first --rank rows as they are: for an adapter trained nested.")
    ] = False,
    base: BaseOfMerge = None,
    format: Format = "diffusers",
    overwrite: Overwrite = False,
) -> None:
    """Lower the rank of an adapter: a smaller file that does nearly the same.

    Example: `lora-diffusion resize style.safetensors --energy 0.95 --rank 16 -o small.safetensors`
    """
    path, _ = parse_adapter(adapter)
    refuse_existing(out, overwrite)

    from lora_diffusion.cli.naming import named_as
    from lora_diffusion.cli.progress import bar, say, saying_warnings
    from lora_diffusion.errors import ConfigError
    from lora_diffusion.formats.files import load_adapter, save_adapter
    from lora_diffusion.merging import cut
    from lora_diffusion.merging import resize as resize_adapter

    if nested and (rank is None or energy is not None or frobenius is not None):
        raise ConfigError("resize: --nested keeps the first rows; give it --rank and neither --energy nor --frobenius")
    with bar() as progress, saying_warnings():
        task = progress.add_task("resizing", total=None, note="")
        whole = load_adapter(path)

        def listen(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        if nested and rank is not None:
            smaller = cut(whole, rank, listen=listen)
        else:
            smaller = resize_adapter(whole, rank=rank, energy=energy, frobenius=frobenius, base=base, listen=listen)
    named = smaller.adapter if base else named_as(smaller.adapter, format, None)
    save_adapter(named, out, format=format, overwrite=overwrite)
    ranks = sorted(smaller.ranks.values())
    found = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    say(f"{out}: {found}, {smaller.kept:.2%} of the energy kept")
