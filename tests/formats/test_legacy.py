"""Pickled files: read for `convert`, tensors only, and nothing in them runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_diffusion import AdapterFileError, load_adapter
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
