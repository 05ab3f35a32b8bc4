"""Adapter files: which spelling they are in, and reading and writing them whole.

Only safetensors are read and written, so that opening a file can never run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.formats import FORMATS, Format, Parsed, container


def load_adapter(path: str | Path, *, strict: bool = True) -> Adapter:
    """Read an adapter file in any known spelling; its name is the file's stem, and no model is touched.

    Strict, a tensor that is not used, half of a pair, a conflict or a value that is not finite raises
    AdapterFileError. Otherwise what is unusable stands with its reason in the adapter's `unused`, and the
    rest is loaded; a file of which nothing can be used raises either way.
    """
    path = Path(path)
    chosen: list[Format] = []
    tensors, metadata = container.read(path, lambda header: chosen.append(_recognise(header, path)))
    try:
        parsed = chosen[0].load(tensors, metadata)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path.name}: {error}") from None
    adapter = Adapter(
        path.stem, parsed.layers, parsed.embeddings, metadata, path, spelling=chosen[0].name, unused=parsed.unused
    )
    _check(adapter, parsed, path, strict)
    return adapter


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str = "diffusers",
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `adapter` as a safetensors file in the spelling `format`, whole or not at all; returns the path.

    `metadata` is added to the adapter's own. AdapterFileError for an adapter without content or with values
    that are not finite, for what the spelling cannot say, and for a file that exists unless `overwrite`.
    TargetError for an unknown format.
    """
    path = Path(path)
    adapter.check()
    tensors, said = FORMATS[format].dump(adapter)
    container.write(path, tensors, {**said, **(metadata or {})}, overwrite)
    return path


def _recognise(header: container.Header, path: Path) -> Format:
    for spelling in FORMATS.values():
        if spelling.recognises(header.entries, header.metadata):
            return spelling
    if not header.entries:
        raise AdapterFileError(
            f"{path.name}: the file holds no tensors; it was probably saved before anything was trained"
        )
    raise AdapterFileError(
        f"{path.name}: none of its {len(header.entries):,} tensors is named like an adapter's "
        f"({some(header.entries)}); it may be a whole model"
    )


def _check(adapter: Adapter, parsed: Parsed, path: Path, strict: bool) -> None:
    if strict and parsed.unused:
        key, why = next(iter(parsed.unused.items()))
        others = f", and {len(parsed.unused) - 1:,} more tensors likewise" if len(parsed.unused) > 1 else ""
        raise AdapterFileError(
            f"{path.name}: {key[:200]!r} cannot be used: {why}{others} (strict=False loads the rest)"
        )
    if not len(adapter) and not adapter.embeddings:
        raise AdapterFileError(f"{path.name}: nothing in it could be used ({some(parsed.unused)})")
    if strict:
        adapter.check()
