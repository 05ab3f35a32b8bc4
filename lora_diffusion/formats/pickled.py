"""What a pickled file may cost, found out before anything unpickles it.

torch.save writes a zip archive without compression: `data.pkl` and a record for each storage; before torch 1.6 it
wrote four pickles and then the storages' bytes. The pickles are looked through opcode by opcode (nothing is built):
they must be short, of opcodes that tensors in tables and lists need, and must not take a tuple out of the memo again,
which is how a few bytes become a key whose hash takes for ever.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

from lora_diffusion.errors import AdapterFileError, printable
from lora_diffusion.formats.container import MAX_TENSORS

MAX_PICKLE = 2 << 20  # bytes; 170 a tensor
_PICKLES = 4  # before the storages of the older kind: magic number, protocol, system, content
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_OPCODES = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", *_TUPLES),
    *("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NEWOBJ"),
}
_MODULES = ("torch", "collections", "_codecs")  # where what may be named lives; torch.load has the names
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")


def check(path: Path) -> None:
    """AdapterFileError for a file that is no pickle, or one that no adapter needs: see above."""
    try:
        with path.open("rb") as file:
            start = file.read(MAX_PICKLE + 1)
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: there is no such file") from None
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be opened ({error.strerror or error})") from None
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        raise AdapterFileError(f"{path.name}: this is a safetensors file; call it {path.stem}.safetensors")
    if start.startswith(b"PK"):
        _check_archive(path)
    elif start.startswith(b"\x80"):
        stream = io.BytesIO(start)
        for _ in range(_PICKLES):
            _check_opcodes(stream, path)
            if stream.tell() == len(start):
                break
    else:
        raise AdapterFileError(
            f"{path.name}: not a file of torch.save; is it a web page, or was the download cut short?"
        )


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
            if fault := _fault(records, pickles, path.stat().st_size):
                raise AdapterFileError(f"{path.name}: {fault}")
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path.name}: a damaged zip archive ({str(error)[:100]})") from None
    _check_opcodes(io.BytesIO(content), path)


def _fault(records: list[zipfile.ZipInfo], pickles: list[zipfile.ZipInfo], size: int) -> str | None:
    if len(pickles) != 1:
        return f"a zip archive with {len(pickles)} pickles, expected the one that torch.save writes; unpack it first"
    if len(records) > MAX_TENSORS + 16:
        return f"{len(records):,} records; no adapter has more than {MAX_TENSORS:,} tensors"
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "its records are compressed, which torch.save never does"
    if sum(record.file_size for record in records) > size:
        return "its records overlap or are longer than the file"
    if pickles[0].file_size > MAX_PICKLE:
        return f"a pickle of {pickles[0].file_size:,} bytes; no adapter needs more than {MAX_PICKLE:,}"
    return None


def _check_opcodes(stream: io.BytesIO, path: Path) -> None:
    """Look through one pickle, up to its STOP."""
    tuples: set[int] = set()
    before = ""
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name not in _OPCODES:
                raise AdapterFileError(f"{path.name}: not a pickle of plain tensors (opcode {opcode.name})")
            if opcode.name == "GLOBAL" and str(argument).partition(" ")[0].partition(".")[0] not in _MODULES:
                named = printable(str(argument).replace(" ", ".")[:100])
                raise AdapterFileError(f"{path.name}: not a pickle of plain tensors (it names {named}, no tensor)")
            if opcode.name in _PUT:
                (tuples.add if before in _TUPLES else tuples.discard)(int(str(argument)))
            elif opcode.name in _GET and int(str(argument)) in tuples:
                raise AdapterFileError(f"{path.name}: not a pickle of plain tensors (a tuple in several places)")
            before = opcode.name
    except ValueError as error:
        if isinstance(error, AdapterFileError):
            raise
        long = f", or longer than the {MAX_PICKLE:,} bytes that adapters need" if stream.tell() > MAX_PICKLE else ""
        raise AdapterFileError(f"{path.name}: a damaged pickle{long} ({str(error)[:100]})") from None
