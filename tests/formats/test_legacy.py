"""Pickled files: read for `convert`, tensors only, and nothing in them runs."""

from __future__ import annotations

import random
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_diffusion import AdapterFileError, load_adapter
from lora_diffusion.formats import container
from lora_diffusion.formats.legacy import load_legacy

PAIR = {
    "lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 8),
    "lora_unet_mid_block_x.lora_up.weight": torch.ones(8, 2),
}


class Trap:
    """Runs when unpickled by whoever lets it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("trapped"),)  # type: ignore[return-value]


@pytest.mark.parametrize("wrap", [lambda table: table, lambda table: {"state_dict": table, "epoch": 3}])
def test_a_table_of_tensors_is_read(wrap, tmp_path: Path):
    torch.save(wrap(PAIR), tmp_path / "a.pt")
    adapter = load_legacy(tmp_path / "a.pt")
    assert (adapter.name, adapter.spelling, len(adapter)) == ("a", "kohya", 1)


@pytest.mark.parametrize("alpha", [4, 0.5, torch.tensor(2.5)])
def test_an_alpha_that_is_a_plain_number_scales_too(alpha: object, tmp_path: Path):
    torch.save({**PAIR, "lora_unet_mid_block_x.alpha": alpha, "epoch": 3}, tmp_path / "a.pt")
    ((*_, layer),) = load_legacy(tmp_path / "a.pt")
    assert (layer.alpha, layer.alpha_source) == (float(alpha), "tensor")  # type: ignore[arg-type]


def test_a_list_is_cloneofsimos(tmp_path: Path):
    torch.save([torch.ones(8, 2), torch.ones(2, 8)] * 3, tmp_path / "a.text_encoder.pt")
    assert load_legacy(tmp_path / "a.text_encoder.pt").layers["text_encoder"].keys() == {"#0", "#1", "#2"}


def test_textual_inversion_of_a1111_is_called_like_its_file(tmp_path: Path):
    table = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(3, 8)}, "name": "x"}
    torch.save(table, tmp_path / "cat.pt")
    assert load_legacy(tmp_path / "cat.pt").embeddings["cat"]["text_encoder"].shape == (3, 8)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Trap()}, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match="not a pickle of plain tensors"):
        load_legacy(tmp_path / "a.pt")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"PK\x03\x04 nothing", b"\x80\x02]q\x00.", b"(lp0\n."])
def test_damaged_pickles_are_errors(content: bytes, tmp_path: Path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(AdapterFileError):
        load_legacy(tmp_path / "a.pt")


def test_the_loading_path_takes_no_pickle_under_any_name(tmp_path: Path):
    for name in ("a.pt", "a.safetensors", "a.bin"):
        torch.save(PAIR, tmp_path / name)
        with pytest.raises(AdapterFileError, match="convert"):
            load_adapter(tmp_path / name)


def archived(path: Path, pickle: bytes, records: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive like torch.save's around a pickle."""
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in {"data.pkl": pickle, "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def edited(path: Path, old: bytes, new: bytes) -> Path:
    """PAIR as torch.save writes it, with other bytes in its pickle."""
    torch.save({"lora_unet_x.lora_down.weight": torch.ones(2, 8)}, path)
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    content = names.pop("data.pkl")
    assert old in content
    return archived(path, content.replace(old, new), names)


DOUBLED = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))  # a tuple of 2**60 things, by the memo
BIG = torch.ones(1 << 16)
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a function by name": (lambda path: archived(path, b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85R."), "os.system"),
    "eval": (lambda path: archived(path, b"\x80\x02c__builtin__\neval\n)R."), "eval"),
    "memory by name": (
        lambda path: archived(path, b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
        "bytearray",
    ),
    "getattr chains": (lambda path: path.write_bytes(b"\x80\x02cbuiltins\ngetattr\n."), "getattr"),
    "protocol 0": (lambda path: path.write_bytes(b"cos\nsystem\n(S'a'\ntR."), "not a file of torch.save"),
    "protocol 4": (lambda path: path.write_bytes(b"\x80\x04\x95\x02\x00\x00\x00\x00\x00\x00\x00}."), "FRAME"),
    "persistent ids": (lambda path: archived(path, b"\x80\x02X\x01\x00\x00\x00aQ."), "no tensor"),
    "a key whose hash takes for ever": (
        lambda path: archived(path, b"\x80\x02}K\x01q\x00" + DOUBLED + b"K\x01s."),
        "a tuple in several places",
    ),
    "doubling on the stack": (lambda path: archived(path, b"\x80\x02K\x01" + b"2\x86" * 60 + b"."), "opcode DUP"),
    "deep nesting": (lambda path: archived(path, b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."), "tuple"),
    "a pickle that never ends": (lambda path: path.write_bytes(b"\x80\x02" + b"(" * (3 << 20)), "longer than"),
    "a long pickle": (lambda path: archived(path, b"\x80\x02" + b"0" * (3 << 20)), "3,145,730 bytes"),
    "a memo beyond all bounds": (lambda path: archived(path, b"\x80\x02}r\xff\xff\xff\xff."), "no tensors by name"),
    "a string of two gigabytes": (lambda path: archived(path, b"\x80\x02X\xff\xff\xff\x7fa."), "damaged pickle"),
    "a zip bomb": (
        lambda path: archived(path, b"\x80\x02}.", {"data/0": bytes(100 << 20)}, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "two pickles": (lambda path: archived(path, b"\x80\x02}.", {"x/data.pkl": b"\x80\x02}."}), "2 pickles"),
    "an archive cut short": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "damaged zip"),
    "an offset beyond the storage": (lambda path: edited(path, b"QK\x00K\x02", b"QK\x7fK\x02"), "plain tensors"),
    "a shape beyond the storage": (
        lambda path: edited(path, b"K\x02K\x08\x86", b"K\x02J\xff\xff\xff\x7f\x86"),
        "plain tensors",
    ),
    "a storage that is not there": (lambda path: edited(path, b"K\x10t", b"J\xff\xff\xff\x7ft"), "plain tensors"),
    "one number as many": (lambda path: torch.save({"a": torch.ones(1).expand(4, 1 << 34)}, path), "claim"),
    "one storage in many tensors": (
        lambda path: torch.save({f"a{i}": BIG.view(4, -1) for i in range(99)}, path),
        "claim",
    ),
    "sparse": (lambda path: torch.save({"a": torch.eye(4).to_sparse()}, path), "sparse"),
    "compressed rows": (lambda path: torch.save({"a": torch.eye(4).to_sparse_csr()}, path), "sparse"),
    "without data": (lambda path: torch.save({"a": torch.ones(2, device="meta")}, path), "without data"),
    "a state that is a list": (lambda path: torch.save({"state_dict": [1]}, path), "no tensors by name"),
    "learned tokens that are a number": (lambda path: torch.save({"string_to_param": 3}, path), "0 learned tokens"),
    "a model that can be run": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path), "compressed"),
    "safetensors under another name": (lambda path: container.write(path, PAIR, {}), "call it a.safetensors"),
    "a web page": (lambda path: path.write_bytes(b"<html>"), "web page"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of sparse layouts and of TorchScript
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_at_once_and_little_memory_is_asked_for(kind: str, tmp_path: Path):
    make, said = HOSTILE[kind]
    make(tmp_path / "a.pt")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(AdapterFileError, match=said) as caught:
        load_legacy(tmp_path / "a.pt")
    assert "a.pt" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_views_of_one_storage_parameters_and_the_older_kind_are_read(zipped: bool, tmp_path: Path):
    whole = torch.arange(32.0)
    tensors = {
        "lora_unet_x.lora_down.weight": whole[:16].view(2, 8),
        "lora_unet_x.lora_up.weight": whole[8:24].view(8, 2),
    }
    parameters = {key: nn.Parameter(tensor) for key, tensor in tensors.items()}
    for content in (tensors, parameters):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        (layer,) = load_legacy(tmp_path / "a.pt").layers["transformer"].values()
        assert torch.equal(layer.tensors["down"], tensors["lora_unet_x.lora_down.weight"])
        assert torch.equal(layer.tensors["up"], tensors["lora_unet_x.lora_up.weight"])


@pytest.mark.filterwarnings("ignore")  # torch's, of what damaged files hold
def test_thousands_of_damaged_pickles_are_errors_or_sound(tmp_path: Path):
    pick, path = random.Random(3), tmp_path / "a.pt"
    sound = []
    for zipped in (True, False):
        torch.save(PAIR, path, _use_new_zipfile_serialization=zipped)
        sound.append(path.read_bytes())
    seen = {"error": 0, "adapter": 0}
    stop = time.monotonic() + 5
    while time.monotonic() < stop and sum(seen.values()) < 3_000:
        content = bytearray(pick.choice(sound))
        for _ in range(pick.choice((1, 2, 8))):
            content[pick.randrange(len(content))] = pick.randrange(256)
        path.write_bytes(bytes(content[: pick.randrange(len(content))]) if pick.random() < 0.2 else bytes(content))
        try:
            load_legacy(path).check()
            seen["adapter"] += 1
        except AdapterFileError:
            seen["error"] += 1
    assert seen["error"] > 100
