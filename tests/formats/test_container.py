"""The safetensors container: what safetensors itself writes, and what nobody should."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_diffusion import AdapterFileError, load_adapter
from lora_diffusion.drafts import ABANDONED
from lora_diffusion.formats import container

SAMPLE = {
    "b": torch.arange(6, dtype=torch.float16).view(2, 3),
    "a": torch.tensor(2.5),
    "scalar": torch.tensor(1, dtype=torch.uint8),
    "c": torch.randn(3, 2, 1, 1).bfloat16(),
    "d": torch.tensor([True, False]),
}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(begin: int, end: int, shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_what_safetensors_writes_is_read_to_the_bit(tmp_path: Path):
    save_file(SAMPLE, tmp_path / "a", metadata={"x": "y"})
    tensors, metadata = container.read(tmp_path / "a")
    assert metadata == {"x": "y"}
    assert tensors.keys() == SAMPLE.keys()
    for name, tensor in SAMPLE.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_what_is_written_is_read_by_safetensors(tmp_path: Path):
    container.write(tmp_path / "a", SAMPLE, {"é": "ü"})
    theirs = load_file(tmp_path / "a")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in SAMPLE.items())
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"é": "ü"}


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path):
    container.write(tmp_path / "a", SAMPLE, {"x": "1", "y": "2"})
    container.write(tmp_path / "b", dict(reversed(SAMPLE.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_share_one_buffer(tmp_path: Path):
    save_file(SAMPLE, tmp_path / "a")
    tensors, _ = container.read(tmp_path / "a")
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1


def test_unaligned_tensors_are_read(tmp_path: Path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": f32(1, 5)}
    (tmp_path / "a").write_bytes(raw(header, b"\x07" + struct.pack("<f", 1.5)))
    tensors, _ = container.read(tmp_path / "a")
    assert (tensors["a"].item(), tensors["b"].item()) == (7, 1.5)


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path):
    container.write(tmp_path / "a", SAMPLE, {})
    with pytest.raises(AdapterFileError, match="exists already"):
        container.write(tmp_path / "a", {"a": torch.ones(1)}, {})
    assert container.read_header(tmp_path / "a").entries.keys() == SAMPLE.keys()
    container.write(tmp_path / "a", {"z": torch.ones(1)}, {}, overwrite=True)
    assert container.read_header(tmp_path / "a").entries.keys() == {"z"}


def test_a_failed_write_leaves_what_was_there_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    container.write(tmp_path / "a", SAMPLE, {})
    before = (tmp_path / "a").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AdapterFileError, match="No space left"):
        container.write(tmp_path / "a", {"z": torch.ones(1)}, {}, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before


INTERRUPTED = """
import resource, sys, torch
from pathlib import Path
from lora_diffusion import AdapterFileError
from lora_diffusion.formats import container
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # as on a disk that becomes full
try:
    container.write(Path(sys.argv[1]), {"z": torch.ones(1 << 20)}, {}, overwrite=True)
except AdapterFileError as error:
    print(error)
"""


def test_a_disk_that_becomes_full_leaves_what_was_there_and_no_litter(tmp_path: Path):
    container.write(tmp_path / "a", SAMPLE, {})
    before = (tmp_path / "a").read_bytes()
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "a")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "nothing was changed" in said
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", before)]


@pytest.mark.parametrize("taken", ["a folder", "below a file"])
def test_a_place_that_cannot_be_written_is_an_error_and_nothing_changes(taken: str, tmp_path: Path):
    (tmp_path / "a").mkdir() if taken == "a folder" else (tmp_path / "a").touch()
    path = tmp_path / "a" if taken == "a folder" else tmp_path / "a" / "b"
    with pytest.raises(AdapterFileError, match="cannot be written"):
        container.write(path, SAMPLE, {}, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_has_left_is_cleared_by_the_next_and_what_another_writes_is_not(tmp_path: Path):
    path, hour = tmp_path / "a.safetensors", ABANDONED
    ages = {".a.safetensors.old.part": hour + 60, ".a.safetensors.new.part": 0, ".b.safetensors.old.part": hour + 60}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    container.write(path, SAMPLE, {})
    assert {found.name for found in tmp_path.iterdir()} == {path.name, *list(ages)[1:]}


def test_the_longest_name_that_a_disk_takes_is_written(tmp_path: Path):
    container.write(tmp_path / ("é" * 127), SAMPLE, {})
    assert len([*tmp_path.iterdir()]) == 1


def test_tensors_without_a_number_are_read_as_such(tmp_path: Path):
    """No byte behind the header: what cannot be used is said by those who use it."""
    empty = torch.zeros(0, 4)
    container.write(tmp_path / "a", {"x.lora_down.weight": empty, "x.lora_up.weight": empty.t().contiguous()}, {})
    tensors, _ = container.read(tmp_path / "a")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "x.lora_down.weight": (0, 4),
        "x.lora_up.weight": (4, 0),
    }
    with pytest.raises(AdapterFileError, match="no elements"):
        load_adapter(tmp_path / "a")


def test_nothing_to_write_is_refused(tmp_path: Path):
    with pytest.raises(AdapterFileError, match="nothing to write"):
        container.write(tmp_path / "a", {}, {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"short", "cut short"),
        (b"<!DOCTYPE html><html>404", "web page"),
        (b"\n<html><body>log in</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"PK\x03\x04" + b"\0" * 100, "zip archive"),
        (b"\x80\x02}q\x00." + b"\0" * 100, "pickle"),
        (b'{"error": "not found"}', "JSON"),
        (b"GGUF" + b"\0" * 100, "GGUF"),
        (raw({}, length=1 << 40), "cut short"),
        (raw(b"{" + b"[" * 100_000), "damaged"),
        (raw(b'{"a": 1, "a": 2}'), "twice"),
        (raw({"a": f32(0, 4), "__metadata__": {"x": 1}}, b"\0" * 4), "table of strings"),
        (raw([]), "JSON object"),
        (raw({"a": f32(0, 4)}, b"\0" * 3), "cut short"),
        (raw({"a": f32(0, 4)}, b"\0" * 5), "no tensor"),
        (raw({"a": f32(0, 4), "b": f32(0, 4)}, b"\0" * 4), "overlaps"),
        (raw({"a": f32(0, 4), "b": f32(8, 12)}, b"\0" * 12), "gap"),
        (raw({"a": f32(0, 4, [2])}, b"\0" * 4), "needs 8 bytes"),
        (raw({"a": f32(0, 4, [1 << 60])}, b"\0" * 4), "wrong kind"),
        (raw({"a": f32(0, 4, [1 << 40, 1 << 40])}, b"\0" * 4), "bytes"),
        (raw({"a": f32(0, 4, [-1])}, b"\0" * 4), "wrong kind"),
        (raw({"a": f32(0, 4, [True])}, b"\0" * 4), "wrong kind"),
        (raw({"a": f32(0, 4, [1] * 40)}, b"\0" * 4), "dimensions"),
        (raw({"a": {"dtype": "C64", "shape": [], "data_offsets": [0, 8]}}, b"\0" * 8), "dtype 'C64'"),
        (raw({"a": 3}), "wrong kind"),
        (raw({"x" * 2000: f32(0, 4)}, b"\0" * 4), "2,000 characters"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), "damaged"),
        (raw(b'{"a": NaN}'), "damaged"),
        (raw(b'{"\xff": 1}'), "damaged"),
    ],
)
def test_broken_and_foreign_files_are_named_for_what_they_are(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(AdapterFileError, match=said) as caught:
        container.read(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(AdapterFileError):
            container.read(path)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path):
    container.write(tmp_path / "whole", SAMPLE, {"x": "y"})
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(AdapterFileError):
            container.read(tmp_path / "cut")


def test_zero_size_tensors_by_the_hundred_thousand_are_refused_at_once(tmp_path: Path):
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    (tmp_path / "a").write_bytes(raw(header))
    started = time.process_time()
    with pytest.raises(AdapterFileError, match="200,000 tensors"):
        container.read(tmp_path / "a")
    assert time.process_time() - started < 0.5


ZERO = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
#: what a file begins with, and its length
HOSTILE: dict[str, tuple[bytes, int]] = {
    "zero-size tensors by the hundred thousand": (raw({f"t{i}": ZERO for i in range(200_000)}), 0),
    "lists without end": (raw(b'{"a":' + b"[" * 20_000_000), 0),
    "a header of a gigabyte": (raw(b"{", length=1 << 30), 2 << 30),
    "a tensor of a gigabyte that is not there": (raw({"a": f32(0, 1 << 30)}), 0),
    "names that are long": (raw({"x" * 999 + str(i): ZERO for i in range(20_000)} | {"y" * 2000: ZERO}), 0),
}
MEASURED = """
import resource, sys
from pathlib import Path
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats.container import read_header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_header(Path(sys.argv[1]))
except AdapterFileError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_in_bounded_memory(name: str, tmp_path: Path):
    content, length = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(max(length, len(content)))  # the rest is no block on the disk
    answer = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True)
    assert int(answer.stdout) * 1024 < 8 * len(content) + (16 << 20)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_that_nobody_writes_into_is_an_error_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="this is a pipe"):
        container.read_header(tmp_path / "x.safetensors")
