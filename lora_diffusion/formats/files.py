"""Adapter files: which spelling they are in, and reading and writing them whole.

Only safetensors are read and written, so that opening a file can never run code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_diffusion.adapter import Adapter, is_finite, not_finite_layers
from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.formats import FORMATS, Format, Parsed, container
from lora_diffusion.formats.container import Header, in_one_piece
from lora_diffusion.formats.keys import UNNAMED, refused
from lora_diffusion.formats.peft_config import SIDECAR_KEY
from lora_diffusion.formats.provenance import hashes, metadata_for
from lora_diffusion.packing import uncollected

PICKLES = (".pt", ".bin", ".ckpt", ".pth")  # what files of torch.save are called
_MAX_SIDECAR = 4 << 20  # characters


@uncollected()
def load_adapter(path: str | Path, *, strict: bool = True) -> Adapter:
    """Read an adapter file, or a PEFT folder, in any known spelling; no model is touched.

    It is called like the file without its ending.

    Strict, a tensor that is not used, half of a pair, a conflict or a value that is not finite raises
    AdapterFileError. Otherwise what is unusable stands with its reason in the adapter's `unused`, and the
    rest is loaded; a file of which nothing can be used raises either way.
    """
    path = Path(path)
    file, beside = _find(path)
    found: list[tuple[Header, Format]] = []
    tensors, metadata = container.read(file, lambda h: found.append((h, _recognise(h.entries, h.metadata, file))))
    (header, spelling) = found[0]
    with ThreadPoolExecutor(1) as aside:
        finite = aside.submit(lambda: all(map(is_finite, in_one_piece(header, tensors))))
        adapter = _understand(spelling, tensors, {**metadata, **beside}, file, strict, finite.result)
    return replace(adapter, name=path.name if path.is_dir() else path.stem, source=path)


def understand(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path, *, strict: bool = True
) -> Adapter:
    """The adapter that named tensors are, in whatever spelling; `file` gives it its name and errors their subject."""
    return _understand(_recognise(tensors, metadata, file), tensors, metadata, file, strict)


def _understand(
    spelling: Format,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    file: Path,
    strict: bool,
    all_finite: Callable[[], bool] = lambda: False,
) -> Adapter:
    """`all_finite` is asked when all is read: whether every value is known to be finite."""
    try:
        parsed = spelling.load(tensors, metadata)
    except AdapterFileError as error:
        raise AdapterFileError(f"{file.name}: {error}") from None
    if UNNAMED in parsed.embeddings:
        parsed.embeddings = _named(parsed.embeddings, file.stem, file)
    _set_aside_what_is_not_finite(parsed, sure=all_finite())
    adapter = Adapter(file.stem, parsed.layers, parsed.embeddings, dict(metadata), file, spelling.name, parsed.unused)
    _check(adapter, file, strict)
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

    The file says what it holds in the keys that other tools read (`modelspec.*`, `ss_*`, hashes); the adapter's
    own metadata is kept where it still holds, and `metadata` stands above both, but for the hashes.
    AdapterFileError for an adapter without content or with values that are not finite, for what the spelling
    cannot say, and for a file that exists unless `overwrite`. TargetError for an unknown format.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise AdapterFileError(f"{path}: safetensors are written, and no pickle; call it {path.stem}.safetensors")
    adapter.check()
    tensors, said = FORMATS[format].dump(replace(adapter, metadata=metadata_for(adapter, metadata)))
    container.write(path, tensors, {**said, **hashes(tensors)}, overwrite)
    return path


def _find(path: Path) -> tuple[Path, dict[str, str]]:
    """The file to read, and what the files beside it say about its scale."""
    if path.is_dir():
        usual = [path / name for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
        files = [file for file in usual if file.is_file()] or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise AdapterFileError(f"{path}: a folder with {len(files)} adapter files; name one ({some(files)})")
        path = files[0]
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        return path, {SIDECAR_KEY: _text(config)}
    return path, {}


def _text(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_MAX_SIDECAR)


def _named(embeddings: dict[str, dict[str, Tensor]], name: str, file: Path) -> dict[str, dict[str, Tensor]]:
    """The token that the file does not name: from cog's `special_params.json`, else the file's own name."""
    beside = file.with_name("special_params.json")
    if file.suffix == ".pti" and beside.is_file():
        try:
            table = json.loads(_text(beside))
            name = str(next(iter(table))) if isinstance(table, dict) and table else name
        except ValueError:
            raise AdapterFileError(f"{file.name}: special_params.json beside it is damaged JSON") from None
    return {token or name: vectors for token, vectors in embeddings.items()}


def _set_aside_what_is_not_finite(parsed: Parsed, *, sure: bool) -> None:
    for component, layers in parsed.layers.items():
        bad = not_finite_layers(layers, sure=sure)
        parsed.unused |= {f"{component}.{name}": fault for name, fault in bad.items()}
        parsed.layers[component] = {name: layer for name, layer in layers.items() if name not in bad}
    for token, vectors in parsed.embeddings.items():
        bad = [component for component, vector in vectors.items() if not is_finite(vector)]
        parsed.unused |= {f"{token} of {c}": "it holds values that are not finite numbers" for c in bad}
        parsed.embeddings[token] = {c: vector for c, vector in vectors.items() if c not in bad}
    parsed.embeddings = {token: vectors for token, vectors in parsed.embeddings.items() if vectors}


def _recognise(keys: Collection[str], metadata: Mapping[str, str], path: Path) -> Format:
    for spelling in FORMATS.values():
        if spelling.recognises(keys, metadata):
            return spelling
    if not keys:
        raise AdapterFileError(f"{path.name}: the file holds no tensors; was it saved before anything was trained?")
    kind = next(filter(None, map(refused, keys)), "a whole model, perhaps")
    raise AdapterFileError(
        f"{path.name}: none of its {len(keys):,} tensors is named like an adapter's ({some(keys)[:300]}); it is {kind}"
    )


def _check(adapter: Adapter, path: Path, strict: bool) -> None:
    unused = adapter.unused
    empty = not len(adapter) and not adapter.embeddings
    if not empty and not (strict and unused):
        return
    key, why = next(iter(unused.items()), ("", "it holds nothing"))
    others = f", and {len(unused) - 1:,} more tensors likewise" if len(unused) > 1 else ""
    fault = f"{key[:200]!r} cannot be used: {why}{others}"
    if strict and unused:
        raise AdapterFileError(f"{path.name}: {fault} (strict=False loads the rest)")
    raise AdapterFileError(f"{path.name}: nothing in it could be used: {fault}")
