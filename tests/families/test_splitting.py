"""Adapters of fused layers, divided: the parts' changes of weight and bias are the rows of the whole one's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_diffusion import AdapterMismatchError, LayerAdapter
from lora_diffusion.families.splitting import of_norm, split_rows, swap_halves
from lora_diffusion.methods import METHODS, bias_change, new_method

WIDTHS = [24, 12, 12]
#: in files these are plain LoRA, or nothing that has rows
OTHERS = ("vera", "adalora", "tlora", "bottleneck")
METHODS_OF_ROWS = [m for m in METHODS if METHODS[m].supports(nn.Linear(16, 48)) and m not in OTHERS]


def filled(method: str, layer: nn.Module, **settings: object) -> LayerAdapter:
    adapter = new_method(method, rank=4, **settings).fresh(layer)
    for tensor in adapter.tensors.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.0)
    return adapter


def with_bias(adapter: LayerAdapter, width: int) -> LayerAdapter:
    """Changing the bias too, where its method can."""
    bias = {"diff_b": torch.randn(width)} if "diff_b" in METHODS[adapter.method].tensors else {}
    return replace(adapter, tensors={**adapter.tensors, **bias})


def changes(adapter: LayerAdapter, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    layer = nn.Linear(weight.shape[1], len(weight))
    layer.weight.data = weight
    assert METHODS[adapter.method].check(adapter, layer) is None
    bias = bias_change(adapter)
    return METHODS[adapter.method].delta(adapter, layer), torch.zeros(len(weight)) if bias is None else bias


@pytest.mark.parametrize("method", METHODS_OF_ROWS)
def test_the_parts_are_the_rows_of_the_whole(method: str):
    fused = nn.Linear(16, sum(WIDTHS))
    adapter = with_bias(filled(method, fused), sum(WIDTHS))
    whole, bias = changes(adapter, fused.weight.data)
    parts = split_rows(adapter, WIDTHS, "qkv")
    weights = fused.weight.data.split(WIDTHS)
    found = [changes(part, weight.clone()) for part, weight in zip(parts, weights, strict=True)]
    torch.testing.assert_close(torch.cat([delta for delta, _ in found]), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([change for _, change in found]), bias)


@pytest.mark.parametrize("method", METHODS_OF_ROWS)
def test_halves_are_exchanged_and_back(method: str):
    fused = nn.Linear(16, 48)
    adapter = with_bias(filled(method, fused), 48)
    if method == "lokr":
        adapter = replace(adapter, tensors={**adapter.tensors, "magnitude": torch.rand(48) + 1})
    whole, bias = changes(adapter, fused.weight.data)
    swapped = swap_halves(adapter, 48, "final")
    found, moved = changes(swapped, fused.weight.data.roll(24, 0))
    torch.testing.assert_close(found.roll(24, 0), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.roll(24), bias)
    assert swap_halves(swapped, 48, "final") == adapter


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_kronecker_product_is_cut_within_a_row_of_its_first_factor(magnitude: bool):
    fused = nn.Linear(16, 36).requires_grad_(requires_grad=False)
    adapter = LayerAdapter("lokr", {"w1": torch.randn(4, 4), "w2": torch.randn(9, 4)}, 4.0)
    if magnitude:
        adapter = replace(adapter, tensors={**adapter.tensors, "magnitude": torch.rand(36) + 1})
    whole, _ = changes(adapter, fused.weight.data)
    parts = split_rows(adapter, [12, 12, 12], "qkv")
    found = [changes(part, weight.clone())[0] for part, weight in zip(parts, fused.weight.data.split(12), strict=True)]
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-5, atol=1e-5)
    x = torch.randn(3, 16)
    for part, weight, delta in zip(parts, fused.weight.data.split(12), found, strict=True):
        layer = nn.Linear(16, 12).requires_grad_(requires_grad=False)
        layer.weight.data = weight.clone()
        branch = METHODS["lokr"].part("a", part, layer).hold(x.device, x.dtype, trainable=False)  # type: ignore[union-attr]
        torch.testing.assert_close(branch.change(layer, x, layer(x)), x @ delta.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("dora", {"by_input": True}, "per-input"),
        ("oft", {"alpha": 0.1}, "unbounded"),
        ("oft", {"stages": 1}, "unbounded"),
        ("vera", {}, "cannot be divided"),
        ("bottleneck", {}, "cannot be divided"),
    ],
)
def test_what_depends_on_all_rows_at_once_is_an_error(method: str, settings: dict[str, object], said: str):
    with pytest.raises(AdapterMismatchError, match=said):
        split_rows(filled(method, nn.Linear(16, 64), **settings), [32, 16, 16], "qkv")


def test_plain_differences_of_a_norm_are_a_norms():
    plain = LayerAdapter("full", {"diff": torch.ones(8), "diff_b": torch.ones(8)})
    found = of_norm(plain, nn.LayerNorm(8))
    assert (found.method, found.tensors.keys()) == ("norm", {"w_norm", "b_norm"})
    assert of_norm(plain, nn.Linear(8, 1)) is plain
