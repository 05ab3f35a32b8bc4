"""`lora-diffusion inspect FILE…`"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lora_diffusion.errors import AdapterFileError, LoraDiffusionError, printable

if TYPE_CHECKING:
    from lora_diffusion.inspection.coverage import CoverageReport
    from lora_diffusion.inspection.spectra import Spectrum


def inspect(
    files: Annotated[list[Path], typer.Argument(help="Adapter or embedding files, or PEFT folders.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            "-b",
            help="Pipeline folder: also say where layers go on it, and how strong DoRA, OFT … are.",
        ),
    ] = None,
    header: Annotated[
        bool, typer.Option("--header", help="Names, shapes and metadata alone: at once, whatever the size.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, one object a file.")] = False,
) -> None:
    """Say what adapter files are, that every tensor in them is used, and how strong they are block by block.

    Exit code 2 if a file cannot be read, 1 if something in one is not used.

    Example: `lora-diffusion inspect style.safetensors kiki.safetensors --base samples/base`
    """
    worst = 0
    for file in files:
        try:
            found, complete = _header(file, as_json) if header else _whole(file, base)
        except LoraDiffusionError as error:
            _complain(file, error, as_json)
            worst = 2
            continue
        _show(found, file, as_json)
        worst = worst if complete else max(worst, 1)
    if worst:
        raise typer.Exit(worst)


def _complain(file: Path, error: LoraDiffusionError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": str(file), "error": str(error)}, ensure_ascii=False))
    else:
        print(f"lora-diffusion: {error}", file=sys.stderr)


def _show(found: dict[str, Any], file: Path, as_json: bool) -> None:
    shown = found.pop("shown", None)
    if as_json:
        print(json.dumps({"file": str(file), **found}, ensure_ascii=False))
        return
    if shown is None:
        width = max(map(len, found))
        print("\n".join([str(file), *(f"  {key:{width}}  {printable(_plain(value))}" for key, value in found.items())]))
        return
    from rich.console import Console

    console = Console()
    for part in shown:
        console.print(part)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in cast("dict[str, object]", value).items())
    return ", ".join(map(str, cast("list[object]", value))) if isinstance(value, list) else str(value)


def _whole(file: Path, base: str | None) -> tuple[dict[str, Any], bool]:
    from lora_diffusion.fitting import fit
    from lora_diffusion.formats.files import load_adapter
    from lora_diffusion.inspection.coverage import cover
    from lora_diffusion.inspection.spectra import leaning, spectra
    from lora_diffusion.inspection.weights import read_weights

    adapter = load_adapter(file, strict=False)
    models = None
    if base:
        from lora_diffusion.families.skeletons import skeleton_of

        models = skeleton_of(base)
        read_weights(models, base, fit(leaning(adapter), models, finite=True).layers)
    report, strengths = replace(cover(adapter, models), hashes=_hashes(file)), spectra(adapter, models)
    found = json.loads(report.to_json()) | {"spectra": [vars(row) for row in strengths]}
    return found | {"shown": _tables(report, strengths)}, report.complete


def _hashes(file: Path) -> dict[str, str]:
    """What Civitai and A1111 know the file by; none of a folder."""
    from lora_diffusion.formats.container import file_digests

    if file.is_dir():
        return {}
    whole, behind = file_digests(file)
    return {"AutoV2": whole[:10], "AutoV3": behind[:12], "sha256": whole}


def _tables(report: CoverageReport, strengths: list[Spectrum]) -> list[Any]:
    from rich.text import Text

    from lora_diffusion.inspection.coverage import bare_table

    table, component = bare_table("block", "‖ΔW‖", "effective rank", title="strength"), ""
    for row in strengths:
        if row.component != component:
            component = row.component
            table.add_row(Text(component, style="bold"))
        table.add_row(Text(f"  {printable(row.block)}"), f"{row.norm:.3g}", f"{row.effective_rank:.1f}")
    return [report, *([table] if strengths else [])]


def _header(file: Path, as_json: bool) -> tuple[dict[str, Any], bool]:
    """Without torch: what the names and the metadata say."""
    from lora_diffusion.formats.container import read_header
    from lora_diffusion.formats.identity import settings_of, tool_of, trigger_words
    from lora_diffusion.formats.keys import split, token_of

    header = read_header(file)
    if not header.entries:
        raise AdapterFileError(f"{file.name}: the file holds no tensors")
    tokens = {key: found for key in header.entries if (found := token_of(key))}
    names = {key: split(key) for key in header.entries if key not in tokens}
    layers = {(name.component, name.layer) for name in names.values() if name}
    found = {
        "tensors": len(header.entries),
        "bytes": max(entry.end for entry in header.entries.values()),
        "dtypes": sorted({entry.dtype for entry in header.entries.values()}),
        "layers": {component: sum(c == component for c, _ in layers) for component in sorted({c for c, _ in layers})},
        "methods": sorted({name.method for name in names.values() if name and name.method != "*"}),
        "tokens": sorted({token or file.stem for token, _ in tokens.values()}),
        "not an adapter's": [key for key, name in names.items() if not name][:20],
        "tool": tool_of(header.metadata),
        "trigger words": trigger_words(header.metadata),
        "settings": settings_of(header.metadata),
        "metadata keys": sorted(header.metadata),
    }
    return {key: value for key, value in found.items() if value or as_json}, True
