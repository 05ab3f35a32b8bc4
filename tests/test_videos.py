"""Convolutions over videos: adapters on them compute what PEFT computes, stack, merge, and come off to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterStack, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.gates import Region
from lora_diffusion.lora import Slot, place
from lora_diffusion.merging.merge import merge
from lora_diffusion.methods import METHODS, new_method
from tests.formats import random_adapters

PATCH = "patch_embedding"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_pair_on_a_convolution_over_videos_is_pefts(method: str):
    layer = nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
    adapter = new_method(method, rank=2, alpha=3.0).fresh(layer)
    for tensor in adapter.tensors.values():
        tensor.normal_(0, 0.5).abs_()
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items() if key != "magnitude"}
    assert shapes == {"down": (2, 4, 2, 3, 3), "up": (6, 2, 1, 1, 1)}
    theirs = nn.Sequential(nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)))
    theirs[0].load_state_dict(layer.state_dict())
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["0"], "use_dora": method == "dora"}
    inject_adapter_in_model(LoraConfig(**settings), theirs, "a")
    theirs[0].lora_A["a"].weight.data = adapter.tensors["down"].clone()
    theirs[0].lora_B["a"].weight.data = adapter.tensors["up"].clone()
    if method == "dora":
        theirs[0].lora_magnitude_vector["a"].weight.data = adapter.tensors["magnitude"].reshape(1, -1, 1, 1, 1).clone()
    x = torch.randn(2, 4, 5, 8, 8)
    slot = Slot(layer, [METHODS[method].part("a", adapter, layer)])
    place(layer, slot)
    expected = theirs(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)  # with gradients: beside the frozen weight
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)  # merged for the call


def wan() -> WanPipeline:
    """A tiny Wan without text encoder and VAE."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
    ).eval()
    absent: Any = None
    return WanPipeline(absent, absent, absent, UniPCMultistepScheduler(), transformer=model)


def answer(pipe: Any) -> Tensor:
    torch.manual_seed(1)
    x, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        return pipe.transformer(x, torch.tensor([500, 100]), text).sample


def adapters(pipe: Any) -> dict[str, Adapter]:
    pair = {"first": (2, 3.0), "second": (3, 1.0)}
    linear = pipe.transformer.blocks[0].attn1.to_q
    found: dict[str, Adapter] = {}
    for name, (rank, alpha) in pair.items():
        patch = random_adapters.low_rank(pipe.transformer.patch_embedding, rank, alpha)
        layers = {PATCH: patch, "blocks.0.attn1.to_q": random_adapters.low_rank(linear, rank, alpha)}
        found[name] = Adapter(name, {"transformer": layers})
    return found


def dense(pipe: Any, weighted: dict[str, float], of: dict[str, Adapter]) -> Tensor:
    """The answer of the same model with the changes added to its weights."""
    model = wan()
    for name, weight in weighted.items():
        for layer, pair in of[name].layers["transformer"].items():
            live = model.transformer.get_submodule(layer)
            live.weight.data += weight * METHODS["lora"].delta(pair, live)
    return answer(model)


@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "comfy"])
def test_two_adapters_on_wans_entrance_stack_fuse_and_come_off(spelling: str, tmp_path: Path):
    pipe = wan()
    base, state = answer(pipe), {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    made = adapters(pipe)
    stack = AdapterStack(pipe)
    for name, weight in (("first", 0.8), ("second", -0.5)):
        path = save_adapter(made[name], tmp_path / f"{name}.safetensors", format=spelling)
        read = load_adapter(path)
        assert read == made[name]
        stack.add(read, weight)
    expected = dense(pipe, {"first": 0.8, "second": -0.5}, made)
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(answer(pipe), expected, rtol=1e-4, atol=1e-4)
    stack.fuse()
    torch.testing.assert_close(answer(pipe), expected, rtol=1e-4, atol=1e-4)
    stack.unfuse()
    stack.weigh("second", [0.0, 0.25])  # one weight a video
    by_video = answer(pipe)
    torch.testing.assert_close(by_video[:1], dense(pipe, {"first": 0.8}, made)[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        by_video[1:], dense(pipe, {"first": 0.8, "second": 0.25}, made)[1:], rtol=1e-4, atol=1e-4
    )
    half = torch.zeros(8, 8)
    half[:4] = 1
    stack.weigh("second", Region(half, 0.5))  # over a video: the mask's mean
    torch.testing.assert_close(answer(pipe), dense(pipe, {"first": 0.8, "second": 0.25}, made), rtol=1e-4, atol=1e-4)
    stack.clear()
    assert torch.equal(answer(pipe), base)
    assert all(torch.equal(state[name], value) for name, value in pipe.transformer.state_dict().items())


def test_diffusers_loads_the_same_from_our_file(tmp_path: Path):
    ours, theirs = wan(), wan()
    adapter = adapters(ours)["first"]
    path = save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers")
    theirs.load_lora_weights(path)
    stack = AdapterStack(ours)
    stack.add(load_adapter(path))
    torch.testing.assert_close(answer(ours), answer(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_merge_of_two_keeps_the_kernel(rank: int | None):
    pipe = wan()
    made = adapters(pipe)
    merged = merge(list(made.values()), [0.8, -0.5], rank=rank).adapter
    expected = dense(pipe, {"first": 0.8, "second": -0.5}, made)
    stack = AdapterStack(pipe)
    stack.add(merged)
    if rank is None:
        torch.testing.assert_close(answer(pipe), expected, rtol=1e-4, atol=1e-4)
    patch = merged.layers["transformer"][PATCH]
    assert patch.tensors["down"].shape[1:] == (4, 1, 2, 2)


def test_a_grouped_one_and_wrong_frames_are_refused_by_name():
    pipe = wan()
    pair = random_adapters.low_rank(nn.Conv3d(4, 24, (3, 2, 2)), 2, 1.0)
    with pytest.raises(Exception, match=r"patch_embedding: down \(2, 4, 3, 2, 2\).*\(24, 4, 1, 2, 2\)"):
        AdapterStack(pipe).add(Adapter("a", {"transformer": {PATCH: pair}}))
    pipe.transformer.patch_embedding = nn.Conv3d(4, 24, (1, 2, 2), stride=(1, 2, 2), groups=2)
    fits = LayerAdapter("lora", {"down": torch.ones(1, 2, 1, 2, 2), "up": torch.ones(24, 1, 1, 1, 1)}, 1.0)
    with pytest.raises(Exception, match="patch_embedding: a Conv3d takes no lora"):
        AdapterStack(pipe).add(Adapter("a", {"transformer": {PATCH: fits}}))


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_the_norm_that_wan_calls_its_third_is_diffusers_second(prefix: str, tmp_path: Path):
    pipe = wan()
    tensors = {f"{prefix}blocks.0.norm3.diff": torch.rand(24), f"{prefix}blocks.0.norm3.diff_b": torch.rand(24)}
    tensors[f"{prefix}blocks.0.norm3.diff"] += 0.5
    save_file(tensors, tmp_path / "a.safetensors")
    expected = wan()
    live = expected.transformer.blocks[0].norm2
    live.weight.data += tensors[f"{prefix}blocks.0.norm3.diff"]
    live.bias.data += tensors[f"{prefix}blocks.0.norm3.diff_b"]
    AdapterStack(pipe).add(load_adapter(tmp_path / "a.safetensors"))
    torch.testing.assert_close(answer(pipe), answer(expected), rtol=1e-4, atol=1e-4)
