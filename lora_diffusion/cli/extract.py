"""`lora-diffusion extract`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli.options import Format, Out, Overwrite, refuse_existing


def extract(
    tuned: Annotated[Path, typer.Argument(help="Diffusers folder or .safetensors checkpoint of the tuned model.")],
    base: Annotated[Path, typer.Argument(help="Diffusers folder of the model it was tuned from.")],
    out: Out = Path("extracted.safetensors"),
    rank: Annotated[int, typer.Option(min=1, help="The most a layer gets.")] = 32,
    energy: Annotated[float, typer.Option(help="Fewer where they keep this share of a layer's energy.")] = 1.0,
    format: Format = "diffusers",
    overwrite: Overwrite = False,
) -> None:
    """An adapter out of a tuned model: what it has and its base has not.

    Example: `lora-diffusion extract tuned-model base-model --rank 32 -o style.safetensors`
    """
    refuse_existing(out, overwrite)

    from lora_diffusion.cli.progress import bar, say
    from lora_diffusion.errors import some
    from lora_diffusion.formats.files import save_adapter
    from lora_diffusion.merging import extract as extract_adapter

    with bar() as progress:
        task = progress.add_task("comparing", total=None, note="")
        found = extract_adapter(
            tuned,
            base,
            rank=rank,
            energy=energy,
            name=out.stem,
            listen=lambda done, of: progress.update(task, completed=done, total=of),
        )
    save_adapter(found.adapter, out, format=format, overwrite=overwrite)
    say(f"{out}: {found.adapter!r}, {found.kept:.2%} of the energy kept")
    if found.left_out:
        say(f"changed, but not in the adapter: {some(found.left_out)}")
