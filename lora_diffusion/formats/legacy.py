"""Pickled adapter files (.pt, .bin, .ckpt): read for `convert` alone, tensors only.

torch.load with `weights_only=True` (torch >= 2.6) builds nothing but tensors and plain containers: an opcode
that names anything else ends the reading. Nothing on the loading path comes here.

    {name: tensor}, also under "state_dict"            any of the other spellings
    [up, down, up, down, …]                            cloneofsimo/lora; `X.text_encoder.pt` is the text encoder's
    {"string_to_param": {"*": (n, 768)}, "name": …}    A1111's textual inversion
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats.files import understand


def load_legacy(path: str | Path, *, strict: bool = True) -> Adapter:
    """The adapter in a pickled file. AdapterFileError for whatever is more than tensors in plain containers."""
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: there is no such file") from None
    except Exception as error:  # whatever a hostile pickle makes the reader raise
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise AdapterFileError(f"{path.name}: not a pickle of plain tensors ({why})") from None
    return understand(_tensors(content, path), {}, path, strict=strict)


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, list):
        return _numbered(cast("list[object]", content), path)
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path.name}: a pickled {type(content).__name__}, expected tensors by name")
    table = cast("dict[Any, Any]", content)
    if "string_to_param" in table:
        return _textual_inversion(table, path)
    inner = table.get("state_dict", table)
    found = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)} if inner else {}
    if not found:
        raise AdapterFileError(f"{path.name}: no tensors in it; it holds {', '.join(map(str, list(table)[:3]))}")
    return {key: value.detach() for key, value in found.items()}


def _numbered(content: list[object], path: Path) -> dict[str, Tensor]:
    if len(content) % 2 or not all(isinstance(item, Tensor) for item in content):
        raise AdapterFileError(f"{path.name}: a list of {len(content)} things, expected up and down tensors in turn")
    component = "text_encoder" if ".text_encoder" in path.name else "unet"
    return {
        f"{component}:{number // 2}:{('up', 'down')[number % 2]}": cast("Tensor", tensor).detach()
        for number, tensor in enumerate(content)
    }


def _textual_inversion(table: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    vectors = [value for value in dict(table["string_to_param"]).values() if isinstance(value, Tensor)]
    if len(vectors) != 1:
        raise AdapterFileError(f"{path.name}: {len(vectors)} learned tokens, expected one")
    return {"emb_params": vectors[0].detach()}
