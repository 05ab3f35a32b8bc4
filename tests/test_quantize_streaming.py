"""Quantising while loading: the same bytes as from memory, one dense layer at a time, other models refused."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.quantize import WeightFiles, empty_model, fingerprint, quantize, weight_bytes
from tests import tiny


class Watched(Mapping[str, Tensor]):
    """Weights that know how many of those that will be quantised are alive."""

    def __init__(self, tensors: dict[str, Tensor], watch: set[str]) -> None:
        self.tensors, self.watch = tensors, watch
        self.read: list[weakref.ref[torch.UntypedStorage]] = []
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name].clone()
        if name in self.watch:
            self.read.append(weakref.ref(tensor.untyped_storage()))  # parameters made of it are other tensors
            self.most = max(self.most, self.alive)
        return tensor

    @property
    def alive(self) -> int:
        return sum(storage() is not None for storage in self.read)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _denoisers() -> list[nn.Module]:
    return [tiny.unet(), tiny.transformer(), tiny.sd3().transformer]


def test_a_model_in_several_files_is_read_like_one_in_one_file(tmp_path: Path) -> None:
    model = tiny.unet()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="1MB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = WeightFiles(tmp_path / "one"), WeightFiles(tmp_path / "many")
    assert set(one) == set(many) == set(model.state_dict())
    assert len(one) == len(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_streamed_from_disk_equals_quantised_in_memory(tmp_path: Path, which: int, precision: str) -> None:
    model = _denoisers()[which]
    model.save_pretrained(tmp_path)
    kind: type[nn.Module] = type(model)
    streamed = empty_model(kind, tmp_path)
    assert all(p.is_meta for p in streamed.parameters())
    assert weight_bytes(streamed) == weight_bytes(model)
    report = quantize(streamed, precision, weights=WeightFiles(tmp_path), device="cpu")
    assert report == quantize(model, precision)
    assert fingerprint(streamed) == fingerprint(model)
    assert not streamed.training


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_one_dense_layer_at_a_time_is_in_memory(tmp_path: Path, precision: str) -> None:
    model = tiny.transformer()
    model.save_pretrained(tmp_path)
    tensors = model.state_dict()
    inner = {name for name in tensors if "transformer_blocks" in name and name.endswith("weight")}
    weights = Watched(tensors, {name for name in inner if tensors[name].ndim == 2})
    streamed = empty_model(FluxTransformer2DModel, tmp_path)
    quantize(streamed, precision, weights=weights)
    assert len(weights.watch) > 20
    assert 1 <= weights.most <= 2
    assert not weights.alive


def test_tied_weights_are_filled_from_either_name() -> None:
    model = tiny.t5(32).eval()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    with init_empty_weights(include_buffers=False):
        empty = tiny.t5(32).eval()
    empty.encoder.embed_tokens.weight = empty.shared.weight
    quantize(empty, "nf4", weights=tensors, device="cpu")
    quantize(model, "nf4")
    assert empty.shared.weight is empty.encoder.embed_tokens.weight
    assert fingerprint(empty) == fingerprint(model)


def test_a_variant_is_chosen_by_name(tmp_path: Path) -> None:
    model = tiny.unet()
    model.save_pretrained(tmp_path)
    model.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert WeightFiles(tmp_path)["conv_in.weight"].dtype == torch.float32
    assert WeightFiles(tmp_path, variant="fp16")["conv_in.weight"].dtype == torch.float16
    with pytest.raises(ConfigError, match="no model weights of variant 'ema'"):
        WeightFiles(tmp_path, variant="ema")


def test_missing_damaged_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model weights"):
        WeightFiles(tmp_path)
    model = tiny.unet()
    model.save_pretrained(tmp_path)
    tensors = dict(WeightFiles(tmp_path))
    for wrong, message in (
        ({name: tensors[name] for name in list(tensors)[1:]}, "the weights lack"),
        (tensors | {"extra": torch.zeros(1)}, "have 'extra' too much"),
        (tensors | {"conv_in.weight": torch.zeros(2)}, r"conv_in\.weight has shape \(2,\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize(empty_model(UNet2DConditionModel, tmp_path), "nf4", weights=wrong)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read as model weights"):
        WeightFiles(tmp_path)
