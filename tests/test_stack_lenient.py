"""`add(…, strict=False)`: what fits goes on, the rest is named, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion import Adapter, AdapterFileError, AdapterMismatchError, AdapterStack, LayerAdapter
from lora_diffusion.formats.kohya import KOHYA
from lora_diffusion.inspection.coverage import cover
from tests import tiny
from tests.formats import random_adapters
from tests.small import Pipe, X, small_adapter


def modules(pipe: Pipe) -> list[int]:
    return [id(module) for module in pipe.unet.modules()]


@pytest.mark.parametrize("fault", ["shape", "nan", "name"])
def test_the_rest_is_on_as_if_the_bad_layer_had_never_been(fault: str):
    good = small_adapter("a", 2, 1)
    del good.layers["unet"]["up_blocks.0.to_out"]
    expected, lenient = Pipe(), Pipe()
    AdapterStack(expected).add(good)
    stack = AdapterStack(lenient)
    stack.add(small_adapter("a", 2, 1, fault), strict=False)
    assert torch.equal(lenient.unet(X), expected.unet(X))
    bad = "unet.nowhere" if fault == "name" else "unet.up_blocks.0.to_out"
    assert list(stack.left_out("a")) == [bad]
    assert cover(stack["a"], lenient).unplaced == stack.left_out("a")


@pytest.mark.parametrize("fault", ["shape", "nan", "name"])
def test_what_came_leniently_is_still_refused_strictly(fault: str):
    pipe = Pipe()
    stack, adapter, before = AdapterStack(pipe), small_adapter("a", 2, 1, fault), pipe.unet(X)
    stack.add(adapter, strict=False)
    stack.clear()
    with pytest.raises((AdapterFileError, AdapterMismatchError), match=r"finite|expected|no place"):
        stack.add(adapter)
    assert torch.equal(pipe.unet(X), before)


def test_an_adapter_of_which_nothing_fits_is_an_error_either_way():
    pipe = Pipe()
    stack, tree = AdapterStack(pipe), modules(pipe)
    foreign = Adapter("x", {"unet": {"elsewhere": small_adapter("a", 2, 1).layers["unet"]["up_blocks.0.to_out"]}})
    with pytest.raises(AdapterMismatchError, match="none of its 1 layers fits"):
        stack.add(foreign, strict=False)
    assert modules(pipe) == tree
    assert not list(stack)


def test_a_file_with_strange_and_infinite_tensors_goes_on_without_them(tmp_path: Path):
    pipe = tiny.sd()
    adapter = random_adapters.over(pipe, "unet")
    tensors, _ = KOHYA.dump(adapter)
    tensors["lora_unet_conv_in.lora_up.weight"][0] = float("inf")
    path = tmp_path / "a.safetensors"
    save_file({**tensors, "../../x": torch.ones(1)}, path)
    stack = AdapterStack(pipe)
    with pytest.raises(AdapterFileError):
        stack.add(path)
    stack.add(path, strict=False)
    assert stack.left_out("a").keys() == {"../../x", "unet.conv_in"}
    assert stack.slots["unet"].keys() == adapter.layers["unet"].keys() - {"conv_in"}
    with pytest.raises(AdapterFileError):  # what was read leniently does not serve a strict reader
        stack.add(path, name="again")


def test_a_fused_layer_and_its_own_part_are_an_error_that_names_both_and_the_first_is_kept_leniently():
    pipe = tiny.flux()
    model = pipe.transformer
    part = "transformer_blocks.0.attn.to_q"
    whole = LayerAdapter("lora", {"down": torch.randn(2, 32), "up": torch.randn(96, 2)}, 2.0)
    layers = {part: random_adapters.low_rank(model.get_submodule(part), 2, 2.0), "double_blocks.0.img_attn.qkv": whole}
    stack = AdapterStack(pipe)
    with pytest.raises(AdapterMismatchError, match=r"img_attn\.qkv' and 'transformer_blocks\.0\.attn\.to_q' .* both"):
        stack.add(Adapter("x", {"transformer": layers}))
    stack.add(Adapter("x", {"transformer": layers}), strict=False)
    assert stack.slots["transformer"].keys() == {part}
    assert "both" in stack.left_out("x")["transformer.double_blocks.0.img_attn.qkv"]


def test_a_share_of_a_fused_layer_that_does_not_fit_leaves_the_whole_of_it_out():
    pipe = tiny.flux()
    wide = LayerAdapter("lora", {"down": torch.randn(2, 31), "up": torch.randn(96, 2)}, 2.0)
    part = "transformer_blocks.1.attn.to_q"
    good = random_adapters.low_rank(pipe.transformer.get_submodule(part), 2, 2.0)
    stack = AdapterStack(pipe)
    stack.add(Adapter("x", {"transformer": {"double_blocks.0.img_attn.qkv": wide, part: good}}), strict=False)
    assert stack.slots["transformer"].keys() == {part}
    assert "expected" in stack.left_out("x")["transformer.double_blocks.0.img_attn.qkv"]
