"""OFT as others store it: LyCORIS' matrices of 2023, PEFT's turned inputs with their own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model
from torch import nn

from lora_diffusion import Adapter, AdapterFileError, AdapterStack, load_adapter, save_adapter
from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.families.splitting import split_rows
from lora_diffusion.formats import container
from lora_diffusion.lora import Slot, place, take_off
from lora_diffusion.methods.oft import OFT


class Net(nn.Module):
    """One layer by name, as PEFT wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer."""
        return self.to_q(x)


class Pipe:
    """A pipeline of that alone."""

    def __init__(self) -> None:
        self.transformer = Net()
        self.components = {"transformer": self.transformer}


def peft_folder(folder: Path, **config: Any) -> tuple[Path, Any]:
    """An OFT folder that PEFT wrote, and the model it wrote it of."""
    model: Any = get_peft_model(Net(), OFTConfig(target_modules=["to_q"], r=0, oft_block_size=4, **config))
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("shared", [False, True])
def test_a_peft_folder_computes_what_peft_does(tmp_path: Path, shared: bool) -> None:
    folder, model = peft_folder(tmp_path / "oft", block_share=shared)
    adapter, x = load_adapter(folder), torch.randn(2, 5, 12)
    assert adapter.methods == {"oft"}
    pipe, before = Pipe(), Net()(x)
    with torch.no_grad(), AdapterStack(pipe) as stack:
        stack.add(adapter)
        torch.testing.assert_close(pipe.transformer(x), model(x), rtol=1e-5, atol=1e-5)
        assert (pipe.transformer(x) - before).abs().max() > 0.01
        share = adapter.layers["transformer"]["to_q"]
        delta = model.base_model.model.to_q.get_delta_weight("default") @ Net().to_q.weight.t()
        torch.testing.assert_close(OFT.delta(share, Net().to_q), delta.t() - Net().to_q.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(pipe.transformer(x), before)
    again = load_adapter(save_adapter(adapter, tmp_path / "again.safetensors", format="kohya"))
    assert again == adapter


def test_onetrainers_mark_divides_the_numbers_by_twice_the_root_of_the_block_less_one(tmp_path: Path) -> None:
    """A scaled OFT of OneTrainer is PEFT's with its numbers divided so."""
    torch.manual_seed(1)
    numbers = torch.randn(3, 6)
    model: Any = get_peft_model(Net(), OFTConfig(target_modules=["to_q"], r=0, oft_block_size=4))
    model.base_model.model.to_q.oft_R["default"].weight.data = numbers / (2 * 3**0.5)
    path, x = tmp_path / "a.safetensors", torch.randn(2, 5, 12)
    stem = "transformer.to_q.oft_R"
    container.write(path, {f"{stem}.weight": numbers, f"{stem}.scaled_oft": torch.tensor(data=True)}, {})
    adapter, pipe = load_adapter(path), Pipe()
    with torch.no_grad(), AdapterStack(pipe) as stack:
        stack.add(adapter)
        torch.testing.assert_close(pipe.transformer(x), model(x), rtol=1e-5, atol=1e-5)
        assert (pipe.transformer(x) - Net()(x)).abs().max() > 0.01
    delta = OFT.delta(adapter.layers["transformer"]["to_q"], Net().to_q)
    torch.testing.assert_close(x @ delta.t(), model(x) - Net()(x), rtol=1e-4, atol=1e-5)
    assert load_adapter(save_adapter(adapter, tmp_path / "again.safetensors", format="kohya")) == adapter
    without = Adapter("b", {"transformer": {"to_q": LayerAdapter("oft", {"scaled": torch.tensor(data=True)})}})
    with pytest.raises(AdapterMismatchError, match="expected one of blocks, diag and R"):
        AdapterStack(Pipe()).add(without)


@pytest.mark.parametrize("config", [{"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 7}, {"coft": True}])
def test_other_series_than_the_files_of_others_have_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(AdapterFileError, match=next(iter(config))):
        load_adapter(peft_folder(tmp_path / "oft", **config)[0])


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(6, 8, 3, padding=1)])
def test_stored_matrices_turn_as_the_blocks_do_that_give_them(make: Any) -> None:
    layer = make()
    blocks = torch.randn(2, 4, 4)
    q = blocks - blocks.transpose(-1, -2)
    turn = torch.linalg.solve(torch.eye(4) - q, torch.eye(4) + q, left=False)
    stored, made = LayerAdapter("oft", {"diag": turn}, 0.0), LayerAdapter("oft", {"blocks": blocks}, 0.0)
    assert OFT.check(stored, layer) is None
    torch.testing.assert_close(OFT.delta(stored, layer), OFT.delta(made, layer), rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 5, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 7, 7)
    place(layer, Slot(layer, [OFT.part("a", stored, layer)]))
    with torch.no_grad():
        changed = layer(x)
        take_off(layer)
        layer.weight += OFT.delta(stored, layer)
        torch.testing.assert_close(changed, layer(x), rtol=1e-4, atol=1e-4)


def test_on_fused_layers_inputs_are_turned_for_every_part_and_matrices_divided() -> None:
    layer, parts = nn.Linear(12, 16), (nn.Linear(12, 8), nn.Linear(12, 8))
    for number, part in enumerate(parts):
        part.weight.data = layer.weight.data[8 * number : 8 * number + 8]
    for tensors in ({"R": torch.randn(3, 6) / 9}, {"diag": torch.randn(4, 4, 4)}):
        whole = LayerAdapter("oft", tensors, 0.0)
        cut = split_rows(whole, [8, 8], "qkv")
        found = torch.cat([OFT.delta(one, part) for one, part in zip(cut, parts, strict=True)])
        torch.testing.assert_close(found, OFT.delta(whole, layer))


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"R": torch.zeros(3, 5)}, r"R \(3, 5\); expected"),
        ({"R": torch.zeros(2, 6)}, r"with n · b = 12"),
        ({"R": torch.zeros(6)}, "expected"),
        ({"R": torch.zeros(3, 0)}, "expected"),
        ({"diag": torch.zeros(8)}, r"diag \(8,\)"),
        ({"rescale": torch.ones(8, 1)}, "one of blocks, diag and R"),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, torch.Tensor], why: str) -> None:
    with pytest.raises(AdapterMismatchError, match=why):
        AdapterStack(Pipe()).add(Adapter("a", {"transformer": {"to_q": LayerAdapter("oft", tensors, 0.0)}}))
    convolution = nn.Conv2d(12, 8, 1)
    if "R" in tensors:
        assert OFT.check(LayerAdapter("oft", tensors, 0.0), convolution) is not None
