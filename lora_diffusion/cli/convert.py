"""`lora-diffusion convert IN OUT --to …`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.errors import TargetError, did_you_mean, printable, some


def convert(
    source: Annotated[Path, typer.Argument(help="Adapter file of any spelling; .pt, .bin and .ckpt too.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file (for peft, the folder) to write.")],
    to: Annotated[str, typer.Option("--to", help="Spelling to write: diffusers, kohya, comfy, embedding or peft.")],
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Pipeline folder, for families not known by heart.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file, or PEFT folder.")] = False,
    strict: Annotated[bool, typer.Option(help="Refuse a file in which something cannot be used.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was written as JSON.")] = False,
) -> None:
    """Write an adapter again in the spelling of another tool, exactly: same deltas, same alphas.

    Pickled files (.pt, .bin, .ckpt) are read here and nowhere else, and only if they hold plain tensors.

    Example: `lora-diffusion convert style.pt style.safetensors --to kohya`
    """
    from lora_diffusion.cli.naming import named_as
    from lora_diffusion.formats import FORMATS
    from lora_diffusion.formats.files import PICKLES, load_adapter, save_adapter
    from lora_diffusion.formats.legacy import load_legacy
    from lora_diffusion.formats.peft_folder import MODEL, save_peft_folder

    written_in = [*(name for name in FORMATS if FORMATS[name].writes), "peft"]
    if to not in written_in:
        raise TargetError(
            f"--to {to}: no such spelling is written{did_you_mean(to, written_in)}; there are {some(written_in, 9)}"
        )
    legacy = source.suffix.lower() in PICKLES
    adapter = load_legacy(source, strict=strict) if legacy else load_adapter(source, strict=strict)
    adapter = named_as(adapter, to, base)
    if to == "peft":
        written = save_peft_folder(adapter, target, overwrite=overwrite) / MODEL
    else:
        written = save_adapter(adapter, target, format=to, overwrite=overwrite)
    said = {
        "from": str(source),
        "read as": f"{adapter.spelling}{' (pickle, tensors only)' if legacy else ''}",
        "to": str(target),
        "written as": to,
        "layers": len(adapter),
        "not used": adapter.unused,
        "bytes": written.stat().st_size,
    }
    if as_json:
        print(json.dumps(said))
        return
    print(f"{said['read as']} -> {to}: {len(adapter):,} layers, {said['bytes']:,} bytes in {target}")
    for key, why in adapter.unused.items():
        print(printable(f"not used: {key}: {why}"))
