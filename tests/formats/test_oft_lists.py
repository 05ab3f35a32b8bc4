"""OFT as sd-scripts writes it for FLUX: a list of blocks, one tensor for each part of a fused layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_diffusion import (
    Adapter,
    AdapterFileError,
    AdapterMismatchError,
    AdapterStack,
    LayerAdapter,
    load_adapter,
    save_adapter,
)
from lora_diffusion.families.naming import resolve
from lora_diffusion.families.original import original
from lora_diffusion.methods import METHODS
from tests import tiny

BLOCKS = 4
#: layer in the file -> rows of its parts, and the layers of the model that own them (tests.tiny.flux is 32 wide)
LAYERS = {
    "double_blocks_0_img_attn_qkv": {f"transformer_blocks.0.attn.to_{part}": 32 for part in "qkv"},
    "double_blocks_1_txt_attn_proj": {"transformer_blocks.1.attn.to_add_out": 32},
    "single_blocks_1_linear1": {
        **{f"single_transformer_blocks.1.attn.to_{part}": 32 for part in "qkv"},
        "single_transformer_blocks.1.proj_mlp": 128,
    },
}


def listed(alpha: float) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, parts in LAYERS.items():
        for number, rows in enumerate(parts.values()):
            tensors[f"oft_unet_{layer}.oft_blocks.{number}"] = torch.randn(BLOCKS, rows // BLOCKS, rows // BLOCKS) * 0.1
        tensors[f"oft_unet_{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def saved(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "oft.safetensors")
    return tmp_path / "oft.safetensors"


def turned_by_sd_scripts(weights: list[Tensor], blocks: list[Tensor], alpha: float) -> list[Tensor]:
    """Its rule: Q of every part bounded by alpha · rows of the part, R = (I + Q)(I - Q)⁻¹, W'ₘ = Σₙ Rₙₘ Wₙ by block."""
    found: list[Tensor] = []
    for weight, part in zip(weights, blocks, strict=True):
        q = part - part.transpose(1, 2)
        norm = torch.norm(q.flatten())
        q = q * ((torch.clamp(norm, max=alpha * len(weight)) + 1e-8) / (norm + 1e-8))
        one = torch.eye(q.shape[1])
        turn = torch.matmul(one + q, (one - q).inverse())
        rows = weight.unflatten(0, (len(part), -1))  # (blocks, size, in)
        found.append(torch.einsum("knm,knp->kmp", turn, rows).flatten(0, 1))
    return found


@pytest.mark.parametrize("alpha", [1e-3, 1.0])
def test_every_part_is_turned_by_its_own_blocks_within_its_own_bound(alpha: float, tmp_path: Path):
    tensors = listed(alpha)
    pipe = tiny.flux()
    model = pipe.transformer
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    adapter = load_adapter(saved(tensors, tmp_path))
    layers = resolve(adapter.layers["transformer"], model).layers
    bounds: set[bool] = set()
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parts in LAYERS.items():
        live = [model.get_submodule(layer) for layer in parts]
        blocks = [tensors[f"oft_unet_{name}.oft_blocks.{number}"] for number in range(len(parts))]
        bounds |= {bool((b - b.mT).norm() > alpha * rows) for b, rows in zip(blocks, parts.values(), strict=True)}
        expected = turned_by_sd_scripts([layer.weight.data for layer in live], blocks, alpha)
        for layer, frozen, weight in zip(parts, live, expected, strict=True):
            delta = METHODS["oft"].delta(layers[layer], frozen)
            torch.testing.assert_close(frozen.weight.data + delta, weight, rtol=1e-5, atol=1e-6)
            x = torch.randn(2, 3, weight.shape[1])
            inputs[layer] = (x, nn.functional.linear(x, weight, frozen.bias))
    assert bounds == {alpha < 1}
    stack = AdapterStack(pipe)
    stack.add(adapter)
    for layer, (x, expected) in inputs.items():
        torch.testing.assert_close(model.get_submodule(layer)(x), expected, rtol=1e-4, atol=1e-5)
    stack.clear()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.state_dict().items())


def test_it_is_written_as_it_was_read_also_after_it_was_on_the_models_names(tmp_path: Path):
    tensors = listed(1e-3)
    adapter = load_adapter(saved(tensors, tmp_path))
    assert load_adapter(save_adapter(adapter, tmp_path / "again.safetensors", format="kohya")) == adapter
    pipe = tiny.flux()
    renamed = original(adapter, pipe.components)
    again = load_adapter(save_adapter(renamed, tmp_path / "renamed.safetensors", format="kohya"))
    assert again == adapter
    written = load_file(tmp_path / "renamed.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("gone", [0, 1])
def test_a_list_with_a_gap_is_an_error(gone: int, tmp_path: Path):
    tensors = listed(1e-3)
    del tensors[f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{gone}"]
    with pytest.raises(AdapterFileError, match=r"blocks\.0, blocks\.1 and so on"):
        load_adapter(saved(tensors, tmp_path))


def test_a_list_that_is_not_the_layers_parts_is_an_error_that_says_both(tmp_path: Path):
    tensors = listed(1e-3)
    del tensors["oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.2"]
    adapter = load_adapter(saved(tensors, tmp_path))
    with pytest.raises(AdapterMismatchError, match=r"\[32, 32\] rows; expected \[32, 32, 32\]"):
        resolve(adapter.layers["transformer"], tiny.flux().transformer)


def test_a_list_on_a_layer_without_parts_is_an_error(tmp_path: Path):
    tensors = listed(1e-3)
    proj = "oft_unet_double_blocks_1_txt_attn_proj.oft_blocks"
    tensors[f"{proj}.1"] = tensors[f"{proj}.0"].clone()
    adapter = load_adapter(saved(tensors, tmp_path))
    with pytest.raises(AdapterMismatchError, match=r"in parts, and 'transformer_blocks.1.attn.to_add_out'"):
        resolve(adapter.layers["transformer"], tiny.flux().transformer)


@pytest.mark.parametrize("suffix", [".oft_blocks.0", ".oft_blocks"])
def test_alpha_0_which_is_no_bound_in_lycoris_and_no_change_in_sd_scripts_is_an_error(suffix: str, tmp_path: Path):
    tensors = {f"oft_unet_x_proj{suffix}": torch.randn(BLOCKS, 8, 8), "oft_unet_x_proj.alpha": torch.tensor(0.0)}
    with pytest.raises(AdapterFileError, match=r"oft_unet_x_proj\.alpha.*alpha 0 to no change"):
        load_adapter(saved(tensors, tmp_path))
    bounded = {key.replace("x_proj", "y_proj"): tensor + 1 for key, tensor in tensors.items()}
    rest = load_adapter(saved(tensors | bounded, tmp_path), strict=False)  # no turn without a bound in its place
    assert (list(rest.layers["transformer"]), rest.unused.keys()) == (["y_proj"], tensors.keys())
    lycoris = {key.replace("oft_unet_", "lora_unet_"): tensor for key, tensor in tensors.items()}
    assert not load_adapter(saved(lycoris, tmp_path)).unused


def test_oft_without_a_bound_is_not_written_as_a_list_which_would_do_nothing(tmp_path: Path):
    layers = {f"transformer_blocks.0.attn.to_{p}": {"blocks": torch.randn(BLOCKS, 8, 8)} for p in "qkv"}
    found = {name: LayerAdapter("oft", blocks, 0.0, "tensor") for name, blocks in layers.items()}
    renamed = original(Adapter("x", {"transformer": found}), tiny.flux().components)
    with pytest.raises(AdapterFileError, match="has no bound"):
        save_adapter(renamed, tmp_path / "x.safetensors", format="kohya")
    assert not list(tmp_path.iterdir())
