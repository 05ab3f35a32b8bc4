"""Pickled adapter files (.pt, .bin, .ckpt): read for `convert` alone, tensors only.

torch.load with `weights_only=True` (torch >= 2.6) builds nothing but tensors and plain containers: an opcode
that names anything else ends the reading. Before it sees the file, `pickled.check` has bounded what it can cost.
Nothing on the loading path comes here.

    {name: tensor}, also under "state_dict"            any of the other spellings
    [up, down, up, down, …]                            cloneofsimo/lora; `X.text_encoder.pt` is the text encoder's
    {"string_to_param": {"*": (n, 768)}, "name": …}    A1111's textual inversion
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import AdapterFileError, printable, some
from lora_diffusion.formats import container, pickled
from lora_diffusion.formats.files import understand

_GLOBAL = re.compile(r"(?:GLOBAL|Unsupported class|class) ([\w.]+)")
_WHY = {
    "TorchScript": "a TorchScript archive, not tensors",
    "tar format": "the tar archive that torch wrote before 0.4",
    "magic number": "a pickle that torch.save has not written",
    "Weights only": "something in it is no tensor",
}


def load_legacy(path: str | Path, *, strict: bool = True) -> Adapter:
    """The adapter in a pickled file. AdapterFileError for whatever is more than tensors in plain containers."""
    path = Path(path)
    pickled.check(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle makes the reader raise
        raise AdapterFileError(f"{path.name}: not a pickle of plain tensors ({_why(error)})") from None
    tensors = {key: tensor.detach() for key, tensor in _tensors(content, path).items()}
    _check_tensors(tensors, path)
    return understand(tensors, {}, path, strict=strict)


def _why(error: Exception) -> str:
    """The cause in a few words; torch's own message is about its versions."""
    said = str(error)
    if named := _GLOBAL.search(said):
        return f"it names {named[1][:100]}, no tensor"
    known = next((why for sign, why in _WHY.items() if sign in said), None)
    return known or printable(said.splitlines()[0][:120] if said else type(error).__name__)


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """AdapterFileError for tensors that are no rows of numbers, or claim more numbers than the file has."""
    if len(tensors) > container.MAX_TENSORS:
        raise AdapterFileError(
            f"{path.name}: {len(tensors):,} tensors; no adapter has more than {container.MAX_TENSORS:,}"
        )
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta
    ]
    if odd:
        raise AdapterFileError(
            f"{path.name}: {some(odd)[:300]} are sparse, quantised or without data; expected numbers"
        )
    claimed, size = sum(t.numel() * t.element_size() for t in tensors.values()), path.stat().st_size
    if claimed > 2 * size:
        raise AdapterFileError(f"{path.name}: its tensors claim {claimed:,} bytes, the whole file has {size:,}")


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, list):
        return _numbered(cast("list[object]", content), path)
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path.name}: a pickled {type(content).__name__}, expected tensors by name")
    table = cast("dict[Any, Any]", content)
    if "string_to_param" in table:
        return _textual_inversion(table, path)
    inner = table.get("state_dict", table)
    found = _named(inner)
    if not found:
        keys = some(key for key in table if isinstance(key, str))[:300]
        raise AdapterFileError(f"{path.name}: no tensors by name in it; it holds {keys or type(inner).__name__}")
    return found


def _named(table: object) -> dict[str, Tensor]:
    """Its tensors, and the alphas that are plain numbers; {} where no value is a tensor."""
    items = cast("dict[object, object]", table).items() if isinstance(table, dict) else ()
    named = {key: value for key, value in items if isinstance(key, str)}
    found = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    alphas = {key: value for key, value in named.items() if key.endswith(".alpha")} if found else {}
    return found | {
        key: torch.tensor(value, dtype=torch.float64)
        for key, value in alphas.items()
        if isinstance(value, float) or type(value) is int
    }


def _numbered(content: list[object], path: Path) -> dict[str, Tensor]:
    if len(content) % 2 or not all(isinstance(item, Tensor) for item in content):
        raise AdapterFileError(f"{path.name}: a list of {len(content)} things, expected up and down tensors in turn")
    component = "text_encoder" if ".text_encoder" in path.name else "unet"
    return {
        f"{component}:{number // 2}:{('up', 'down')[number % 2]}": cast("Tensor", tensor)
        for number, tensor in enumerate(content)
    }


def _textual_inversion(table: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    vectors = [*_named(table["string_to_param"]).values()]
    if len(vectors) != 1:
        raise AdapterFileError(f"{path.name}: {len(vectors)} learned tokens, expected one")
    return {"emb_params": vectors[0]}
