"""Every family is quantised while it is read: denoiser and text encoders, one dense layer at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion import pipelines
from lora_diffusion.families import family_of
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.quantize import WeightFiles, fingerprint, is_quantized
from tests import tiny
from tests.families.test_training import PIPELINES


class Account:
    """Bytes of all tensors read from files that are still in memory, at the peak and now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[str] = []
        self.alive: list[weakref.ref[torch.UntypedStorage]] = []
        self.peak = 0
        get = WeightFiles.__getitem__

        def counted(files: WeightFiles, name: str) -> Tensor:
            tensor = get(files, name).clone()  # as it is read it shares the memory of the file
            self.read.append(name)
            self.alive.append(weakref.ref(tensor.untyped_storage()))
            self.peak = max(self.peak, self.now)
            return tensor

        monkeypatch.setattr(WeightFiles, "__getitem__", counted)

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for one in self.alive if (storage := one()) is not None)


@pytest.mark.parametrize("name", PIPELINES)
def test_no_family_is_in_memory_dense(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PIPELINES[name]()
    whole.save_pretrained(tmp_path)
    account = Account(monkeypatch)
    opened = load_pipeline(tmp_path, precision="nf4", text_encoders="nf4", device="cpu")
    parts = {part: getattr(opened.pipe, part) for part in _read_parts(opened.pipe)}
    dense = [
        getattr(whole, part).get_submodule(inner).weight.nbytes
        for part, model in parts.items()
        for inner, layer in model.named_modules()
        if is_quantized(layer)
    ]
    assert len(account.read) == sum(len(WeightFiles(tmp_path / part)) for part in parts)
    assert sum(dense) > 8 * max(dense), "else reading it whole would pass"
    assert account.peak <= account.now + 2 * max(dense)
    assert account.now <= sum(_kept_bytes(model) for model in parts.values())


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_read_so_is_what_is_quantised_after_reading_it_whole(name: str, tmp_path: Path) -> None:
    whole = PIPELINES[name]()
    whole.save_pretrained(tmp_path)
    read = load_pipeline(tmp_path, precision="nf4", text_encoders="nf4", device="cpu").pipe
    pipelines.quantize_encoders(whole, "nf4", torch.float32, "cpu")
    for part in family_of(read).text_encoders:
        assert fingerprint(getattr(read, part)) == fingerprint(getattr(whole, part))


def test_a_base_of_the_hub_is_read_layer_by_layer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--me--tiny"
    tiny.flux().save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", "utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    account = Account(monkeypatch)
    opened = load_pipeline("me/tiny", precision="nf4", device="cpu")
    assert len(account.read) == len(WeightFiles(repository / "snapshots" / "abc" / "transformer"))
    assert opened.report is not None
    assert opened.report.quantized


def _read_parts(pipe: Any) -> list[str]:
    family = family_of(pipe)
    return [family.denoiser, *(name for name in family.text_encoders if getattr(pipe, name) is not None)]


def _kept_bytes(model: nn.Module) -> int:
    """Of what is not quantised."""
    quantised = {id(p) for layer in model.modules() if is_quantized(layer) for p in [getattr(layer, "weight", None)]}
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in quantised)
