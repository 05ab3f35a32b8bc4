"""Opening adapter files whole: strict or with a report, and the real files where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion import Adapter, AdapterFileError, LayerAdapter, load_adapter, save_adapter

LAYER = "unet.mid_block.attentions.0.proj_in"


def pair(layer: str = LAYER, rank: int = 2, width: int = 8) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.randn(rank, width), f"{layer}.lora_B.weight": torch.randn(width, rank)}


def saved(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_an_adapter_is_called_like_its_file_and_knows_where_it_came_from(tmp_path: Path):
    path = saved(tmp_path, pair())
    adapter = load_adapter(str(path))
    assert (adapter.name, adapter.source, adapter.spelling, len(adapter)) == ("style", path, "diffusers", 1)


def test_strict_names_the_unused_tensor_and_lenient_reports_it(tmp_path: Path):
    path = saved(tmp_path, {**pair(), "unet.conv_in.lora_A.weight": torch.randn(2, 4)})
    with pytest.raises(AdapterFileError, match=r"style.safetensors: 'unet.conv_in.lora_A.weight'.*needs up"):
        load_adapter(path)
    adapter = load_adapter(path, strict=False)
    assert list(adapter.unused) == ["unet.conv_in.lora_A.weight"]
    assert len(adapter) == 1


def test_a_file_of_which_nothing_can_be_used_is_an_error_either_way(tmp_path: Path):
    path = saved(tmp_path, {f"{LAYER}.lora_A.weight": torch.randn(2, 4)})
    with pytest.raises(AdapterFileError, match="nothing in it could be used"):
        load_adapter(path, strict=False)


def test_a_whole_model_is_refused_for_what_it_is(tmp_path: Path):
    path = saved(tmp_path, {"conv_in.weight": torch.ones(4), "conv_in.bias": torch.ones(4)})
    with pytest.raises(AdapterFileError, match="a whole model"):
        load_adapter(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(value: float, tmp_path: Path):
    tensors = pair()
    tensors[f"{LAYER}.lora_B.weight"][3, 1] = value
    with pytest.raises(AdapterFileError, match="not finite"):
        load_adapter(saved(tmp_path, tensors))


def test_an_adapter_without_layers_is_not_written(tmp_path: Path):
    with pytest.raises(AdapterFileError, match="no layer"):
        save_adapter(Adapter("x", {"unet": {}}), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_metadata_given_when_saving_is_in_the_file(tmp_path: Path):
    layer = LayerAdapter("lora", {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}, 1.0)
    path = save_adapter(Adapter("x", {"unet": {"conv_in": layer}}), tmp_path / "a.safetensors", metadata={"k": "v"})
    assert load_adapter(path).metadata["k"] == "v"
