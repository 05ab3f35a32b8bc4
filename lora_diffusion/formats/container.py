"""The safetensors container: a header checked by us, tensors as views of one read, atomic writing.

    8 bytes   n, little-endian
    n bytes   JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}}
    the rest  the tensors' bytes, without gaps or overlaps

(https://github.com/huggingface/safetensors#format.) The header is distrusted: every size is checked before
memory is asked for, and nothing here needs torch until the tensors themselves are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeGuard, cast

from lora_diffusion.drafts import whole_file
from lora_diffusion.errors import AdapterFileError, some

if TYPE_CHECKING:
    from torch import Tensor

#: bytes per element of the dtypes an adapter may hold, and torch's name for them
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "F32": (4, "float32"),
    "I32": (4, "int32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I16": (2, "int16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
_NAMES = {torch_name: (width, name) for name, (width, torch_name) in DTYPES.items()}
MAX_HEADER = 32 << 20  # bytes; the largest adapters seen, tag lists included, need 4 MiB
MAX_BRACKETS = 2_000_000  # what opens a list or table, also inside metadata strings; each costs the parser 64 bytes
MAX_TENSORS = 50_000  # the largest adapters seen hold 7,000
MAX_DIMENSIONS = 6
MAX_NAME = 1_000  # characters
_AT_ONCE = 64 << 20  # bytes to read before looking whether they are wanted


class Entry(NamedTuple):
    """One tensor of a file: its dtype by safetensors' name, shape, and byte range behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says it holds. `data` is the file offset of the first tensor byte."""

    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    data: int = 0


def read_header(path: Path) -> Header:
    """The checked header of `path`. AdapterFileError for anything but a sound safetensors file."""
    with _opened(path) as file:
        return _read_header(file, path)


def read(path: Path, accept: Callable[[Header], object] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of `path`; the tensors share one buffer into which the file was read once.

    `accept` sees the header first and may raise, so that a file of no use costs little more than its header: what is
    behind it is read meanwhile, and no further once one of both has failed.
    """
    import torch

    with _opened(path) as file, ThreadPoolExecutor(1) as beside:
        raw, size = _raw_header(file, path)
        unwanted = Event()
        reading = beside.submit(_behind, file, size, unwanted)
        try:
            header = _parse(raw, size, len(raw) + 8, path)
            if accept:
                accept(header)
            buffer = reading.result()
        finally:
            unwanted.set()
        if buffer is None:
            raise AdapterFileError(f"{path.name}: the file became shorter while it was read")
    typed = {dtype: buffer.view(getattr(torch, name)) for dtype, (_, name) in DTYPES.items()}
    return {name: _view(typed[entry.dtype], entry) for name, entry in header.entries.items()}, header.metadata


def in_one_piece(header: Header, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """All numbers that were read with this header, as few vectors; every tensor for itself where that cannot be."""
    kinds: dict[str, list[str]] = {}
    for name, entry in header.entries.items():
        kinds.setdefault(entry.dtype, []).append(name)
    wholes: list[Tensor] = []
    for dtype, names in kinds.items():
        entries, width = [header.entries[name] for name in names], DTYPES[dtype][0]
        low, high = min(entry.begin for entry in entries), max(entry.end for entry in entries)
        if sum(entry.end - entry.begin for entry in entries) < high - low or low % width:
            wholes += [tensors[name] for name in names]
        else:
            wholes.append(tensors[names[0]].as_strided(((high - low) // width,), (1,), low // width))
    return wholes


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], overwrite: bool = False) -> None:
    """Write a safetensors file, whole or not at all.

    Same tensors and metadata, same bytes. AdapterFileError where nothing would be written, or where `path`
    exists and `overwrite` is not set; a failure leaves what was there before.
    """
    if not tensors:
        raise AdapterFileError(f"{path.name}: there is nothing to write; an adapter without tensors does nothing")
    if path.exists() and not overwrite:
        raise AdapterFileError(f"{path} exists already; choose another name or ask to overwrite it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft, draft.open("wb") as file:
            _serialise(file, tensors, metadata)
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that `write` puts behind the header: same tensors, same digest, whatever the metadata."""
    found = hashlib.sha256()
    for key in _in_order(tensors):
        found.update(_bytes(tensors[key]))
    return found.hexdigest()


def file_digests(path: Path) -> tuple[str, str]:
    """SHA-256 of a whole file, and of all behind its header. AdapterFileError for no sound safetensors file."""
    with _opened(path) as file:
        start = _read_header(file, path).data
        file.seek(0)
        whole, behind = hashlib.sha256(file.read(start)), hashlib.sha256()
        while block := file.read(1 << 20):
            whole.update(block)
            behind.update(block)
    return whole.hexdigest(), behind.hexdigest()


def _behind(file: BinaryIO, size: int, unwanted: Event) -> Tensor | None:
    """The next `size` bytes, in whole elements of every dtype. None where the file ends before, or when `unwanted`."""
    import numpy
    import torch

    memory = numpy.empty(-(-size // 8) * 8 or 8, dtype=numpy.uint8)  # in huge pages
    target, done = memory.data, 0
    while done < size and not unwanted.is_set():
        count = cast("Any", file).readinto(target[done : min(done + _AT_ONCE, size)])
        if not count:
            return None
        done += count
    return torch.from_numpy(memory)


def _opened(path: Path) -> BinaryIO:
    try:
        if path.is_fifo():  # to open one waits for whoever writes into it
            raise AdapterFileError(f"{path}: this is a pipe, not a file; save what comes out of it first")
        return path.open("rb", buffering=0)  # type: ignore[return-value]
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: there is no such file") from None
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be opened ({error.strerror or error})") from None


def _read_header(file: BinaryIO, path: Path) -> Header:
    raw, size = _raw_header(file, path)
    return _parse(raw, size, len(raw) + 8, path)


def _raw_header(file: BinaryIO, path: Path) -> tuple[bytes, int]:
    """The header as it stands there, and how many bytes follow it, at which the file stands then."""
    total = os.fstat(file.fileno()).st_size
    start = file.read(512)
    _refuse_other_kinds(start, path)
    length = int.from_bytes(start[:8], "little")
    if total < 10 or not 2 <= length <= total - 8:
        raise AdapterFileError(
            f"{path.name}: {total:,} bytes, of which the header should be {length:,}; it is cut short or no safetensors"
        )
    if length > MAX_HEADER:
        raise AdapterFileError(f"{path.name}: a header of {length:,} bytes; no adapter needs more than {MAX_HEADER:,}")
    file.seek(8)
    return file.read(length), total - 8 - length


_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"PK\x03\x04": "a zip archive (a PyTorch pickle, probably); `lora-diffusion convert` reads those",
    b"\x80\x02": "a Python pickle; `lora-diffusion convert` reads those",
    b"\x80\x03": "a Python pickle; `lora-diffusion convert` reads those",
    b"\x80\x04": "a Python pickle; `lora-diffusion convert` reads those",
    b"\x80\x05": "a Python pickle; `lora-diffusion convert` reads those",
    b"GGUF": "a GGUF model, not an adapter in safetensors",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"\x89PNG": "a PNG picture, not an adapter",
    b"\xff\xd8\xff": "a JPEG picture, not an adapter",
}


def _refuse_other_kinds(start: bytes, path: Path) -> None:
    if not start:
        raise AdapterFileError(f"{path.name}: the file is empty; a download was probably cut short")
    for magic, kind in _OTHER_KINDS.items():
        # a pickle's protocol byte could also open a header length: there a JSON brace follows 8 bytes on
        if start.startswith(magic) and start[8:9] != b"{":
            raise AdapterFileError(f"{path.name}: this is {kind}")
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise AdapterFileError(f"{path.name}: this is a web page; the download address led to a login or error page")
    if text.startswith((b'{"', b"{'", b"[")) and start[8:9] != b"{":
        raise AdapterFileError(f"{path.name}: this is JSON text; a download probably answered with an error message")


def _parse(raw: bytes, size: int, data: int, path: Path) -> Header:
    claimed = raw.count(b'"data_offsets"')
    if claimed > MAX_TENSORS:
        raise AdapterFileError(f"{path.name}: {claimed:,} tensors; no adapter has more than {MAX_TENSORS:,}")
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise AdapterFileError(f"{path.name}: a header of more than {MAX_BRACKETS:,} lists; no adapter needs that many")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path.name}: the header is damaged ({_short(error)})") from None
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path.name}: the header is not a JSON object; not a safetensors file")
    table = cast("dict[str, Any]", header)
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", metadata).values()):
        raise AdapterFileError(f"{path.name}: `__metadata__` is not a table of strings; the header is damaged")
    entries = {name: _entry(name, value, path.name) for name, value in table.items()}
    _check_ranges(entries, size, path)
    return Header(entries, cast("dict[str, str]", metadata), data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{some(twice)[:200]} stands there twice")
    return table


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _short(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _entry(name: str, value: object, file: str) -> Entry:
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    dtype, shape, ends = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    fault = _fault(name, dtype, shape, ends)
    if fault:
        raise AdapterFileError(f"{file}: tensor {name[:200]!r}: {fault}")
    return Entry(cast("str", dtype), tuple(cast("list[int]", shape)), *cast("list[int]", ends))


def _fault(name: str, dtype: object, shape: object, ends: object) -> str | None:
    if len(name) > MAX_NAME:
        return f"a name of {len(name):,} characters; the header is damaged"
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(ends):
        return "dtype, shape or range is missing or of the wrong kind; the header is damaged"
    if dtype not in DTYPES:
        return f"dtype {dtype[:40]!r}; adapters hold {', '.join(DTYPES)}"
    if len(shape) > MAX_DIMENSIONS or len(ends) != 2:
        return f"{len(shape)} dimensions, {len(ends)} range ends; the header is damaged"
    needed, has = math.prod(shape) * DTYPES[dtype][0], ends[1] - ends[0]
    return None if needed == has else f"{dtype} {shape} needs {needed:,} bytes, its range has {has:,}; it is damaged"


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not {*map(type, cast("list[object]", value))} <= {int}:
        return False
    sizes = cast("list[int]", value)
    return not sizes or (min(sizes) >= 0 and max(sizes) < 1 << 48)


def _check_ranges(entries: dict[str, Entry], size: int, path: Path) -> None:
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            what = "overlaps another" if entry.begin < reached else "leaves a gap before it"
            raise AdapterFileError(f"{path.name}: tensor {name[:200]!r} {what}; the header is damaged")
        reached = entry.end
    if reached != size:
        found = "cut short" if reached > size else "followed by bytes that belong to no tensor"
        raise AdapterFileError(
            f"{path.name}: {size:,} bytes of tensors, the header speaks of {reached:,}; it is {found}"
        )


def _view(elements: Tensor, entry: Entry) -> Tensor:
    """The part of the buffer, seen as elements of the entry's dtype, that is its tensor: one call, no copy."""
    import torch

    width = DTYPES[entry.dtype][0]
    if entry.begin % width:  # the format asks for no alignment; torch does
        part = elements.view(torch.uint8)[entry.begin : entry.end].clone()
        return part.view(elements.dtype).view(entry.shape)
    return elements.as_strided(entry.shape, _strides(entry.shape), entry.begin // width)


@lru_cache(maxsize=256)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _serialise(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    kinds = {key: _kind(tensor) for key, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = _in_order(tensors)
    begin = 0
    for key in order:
        end = begin + tensors[key].numel() * kinds[key][0]
        header[key] = {"dtype": kinds[key][1], "shape": list(tensors[key].shape), "data_offsets": [begin, end]}
        begin = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for key in order:
        file.write(_bytes(tensors[key]))


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda key: (-_kind(tensors[key])[0], key))  # wide dtypes first: all stay aligned


def _kind(tensor: Tensor) -> tuple[int, str]:
    """Bytes per element, and safetensors' name of the dtype. AdapterFileError for one that no adapter holds."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _NAMES:
        raise AdapterFileError(f"a tensor of {name} cannot be written; adapters hold {', '.join(_NAMES)}")
    return _NAMES[name]


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
