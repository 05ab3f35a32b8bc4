"""The stack under random use, compiled, offloaded, fused, and with learned tokens: always reversible to the bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterStack, LayerAdapter, LoRA
from lora_diffusion.errors import AdapterMismatchError, ConfigError, LoraDiffusionError
from lora_diffusion.quantize import fingerprint, quantize
from lora_diffusion.targets import find_targets
from tests import tiny
from tests.test_gates import adapter


class Small(nn.Module):
    """A denoiser of two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 12)})])
        self.mid_block = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3, padding=1)})
        self.up_blocks = nn.ModuleList([nn.ModuleDict({"to_out": nn.Linear(12, 5)})])
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mid_block["conv"](x).flatten(2).transpose(1, 2)
        return self.up_blocks[0]["to_out"](self.down_blocks[0]["to_q"](tokens).relu())


class Pipe:
    """As much of a pipeline as a stack needs."""

    def __init__(self) -> None:
        self.unet = Small()

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet}


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def small_adapter(name: str, rank: int, seed: int, fault: str = "") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    found = find_targets(Small(), "all-linear+conv")
    layers = {n: LoRA(rank).fresh(layer, generator) for n, layer in found.items()}
    for new in layers.values():
        new.tensors["up"].normal_(generator=generator)
    last = layers["up_blocks.0.to_out"]
    if fault == "shape":
        layers["up_blocks.0.to_out"] = LayerAdapter("lora", {**last.tensors, "up": torch.ones(4, rank)}, 1.0)
    if fault == "nan":
        last.tensors["down"].fill_(float("nan"))
    if fault == "name":
        layers["nowhere"] = layers.pop("up_blocks.0.to_out")
    return Adapter(name, {"unet": layers})


ADAPTERS = {
    "a": small_adapter("a", 2, 1),
    "training": small_adapter("training", 3, 2),
    "c.v1": small_adapter("c.v1", 1, 3),
}
BROKEN = {fault: small_adapter(fault, 2, 4, fault) for fault in ("shape", "nan", "name")}
WEIGHTS = st.sampled_from([0.0, 1.0, -0.5, 0.8, {"down": 0.3}, "0.5@0-1", [1.0, 0.0], float("nan"), {"dwon": 1.0}])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([*ADAPTERS, *BROKEN]), WEIGHTS),
        st.tuples(st.just("weigh"), st.sampled_from(list(ADAPTERS)), WEIGHTS),
        st.tuples(st.sampled_from(["remove", "fuse", "unfuse"]), st.sampled_from(list(ADAPTERS)), st.just(0.0)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_any_history_leaves_what_the_adapters_alone_would_give(steps: list[tuple[str, str, Any]]) -> None:
    pipe = Pipe()
    stack, before, tree, base = AdapterStack(pipe), fingerprint(pipe.unet), str(pipe.unet), pipe.unet(X)
    expected: dict[str, Any] = {}
    for action, name, weight in steps:
        try:
            if action == "add":
                stack.add({**ADAPTERS, **BROKEN}[name], weight)
            elif action == "weigh":
                stack.weigh(name, weight)
            elif action == "remove":
                stack.remove(name)
            else:
                getattr(stack, action)()
        except LoraDiffusionError:
            continue
        if action in ("add", "weigh"):
            expected[name] = weight
        elif action == "remove":
            del expected[name]
    stack.unfuse()
    assert stack.weights == expected
    with torch.no_grad():
        ours = pipe.unet(X)
        fresh = Pipe()
        other = AdapterStack(fresh)
        for name in sorted(expected, reverse=True):
            other.add(ADAPTERS[name], expected[name])
        assert torch.equal(ours, fresh.unet(X))
    stack.clear()
    assert (fingerprint(pipe.unet), str(pipe.unet)) == (before, tree)
    assert torch.equal(pipe.unet(X), base)


def test_no_recompilation_over_weight_changes_and_swaps_within_the_reserve() -> None:
    graphs: list[int] = []

    def counting(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(1)
        return module.forward

    torch._dynamo.reset()
    pipe = Pipe()
    stack = AdapterStack(pipe)
    stack.reserve(8, "all-linear+conv")
    compiled = torch.compile(pipe.unet, backend=counting)
    with torch.no_grad():
        base = compiled(X)
        after_first = len(graphs)
        results = []
        stack.add(ADAPTERS["a"])
        for weight in (1.0, 0.0, -2.0, {"down": 0.5}):
            stack.weigh("a", weight)
            results.append(compiled(X))
        stack.add(ADAPTERS["training"], 0.5)
        results.append(compiled(X))
        stack.remove("a")
        stack.add(ADAPTERS["c.v1"], 0.7)
        stack.weigh_all({"c.v1": 0.1, "training": 1.0})
        results.append(compiled(X))
        stack.clear()
        results.append(compiled(X))
        assert len(graphs) == after_first
        stack.add(ADAPTERS["a"])
        torch.testing.assert_close(compiled(X), results[0])
        torch.testing.assert_close(pipe.unet(X), results[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[1], base)
    assert torch.equal(results[-1], base)
    stack.clear()
    stack.release()
    assert str(pipe.unet) == str(Small())


def test_a_schedule_does_not_recompile() -> None:
    graphs: list[int] = []

    def counting(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(1)
        return module.forward

    torch._dynamo.reset()
    pipe = Pipe()
    pipe.unet = torch.compile(pipe.unet, backend=counting)
    stack = AdapterStack(pipe)
    stack.reserve(8, "all-linear+conv")
    stack.add(ADAPTERS["a"], lambda progress: weights.pop(0))
    weights = [0.0, 0.5, 1.0] * 3
    with torch.no_grad():
        outs = []
        for value in (0.0, 0.5, 1.0):
            weights[:] = [value] * 3
            outs.append(pipe.unet(X))
            if value == 0.0:
                first = len(graphs)
    assert len(graphs) == first
    assert not torch.equal(outs[1], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fusing_many_times_leaves_every_bit(sd: Any, dtype: torch.dtype) -> None:
    sd.to(dtype=dtype)
    before, one = fingerprint(sd.unet), adapter(sd)
    with AdapterStack(sd) as stack:
        stack.add(one, 0.8)
        if dtype == torch.float32:
            apart = tiny.picture(sd)
            stack.fuse()
            np.testing.assert_allclose(tiny.picture(sd), apart, atol=1e-5)
            stack.unfuse()
        for _ in range(5):
            stack.fuse()
            assert fingerprint(sd.unet) != before
            with pytest.raises(ConfigError, match="fused"):
                stack.weigh("a", 0.3)
            stack.unfuse()
            assert fingerprint(sd.unet) == before
        stack.fuse()
    assert fingerprint(sd.unet) == before


def test_fuse_refuses_what_it_cannot_hold(sd: Any) -> None:
    with AdapterStack(sd) as stack:
        stack.add(adapter(sd), "0@0,1@1")
        with pytest.raises(ConfigError, match="by step"):
            stack.fuse()
    quantize(sd.unet, "nf4", compute_dtype=torch.float32)
    before = fingerprint(sd.unet)
    with AdapterStack(sd) as stack:
        stack.add(adapter(sd))
        with pytest.raises(ConfigError, match="quantised"):
            stack.fuse()
        assert fingerprint(sd.unet) == before


def test_tokens_come_and_go_with_the_adapter(sd: Any) -> None:
    tokenizer, table = sd.tokenizer, sd.text_encoder.get_input_embeddings()
    weight, vocabulary, base = table.weight, len(tokenizer), tiny.picture(sd, "a <fox>")
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    carried = Adapter("t", adapter(sd).layers, {"<fox>": {"text_encoder": vectors}})
    with AdapterStack(sd) as stack:
        stack.add(carried, 0.0)
        ids = sd.tokenizer.convert_tokens_to_ids(["<fox>", "<fox>_1"])
        assert ids == [vocabulary, vocabulary + 1]
        assert torch.equal(sd.text_encoder.get_input_embeddings().weight[ids], vectors)
        assert np.abs(tiny.picture(sd, "a <fox>") - base).max() > 1e-3
        with pytest.raises(AdapterMismatchError, match="known already"):
            stack.add(Adapter("u", {}, {"<fox>": {"text_encoder": vectors}}))
        with pytest.raises(AdapterMismatchError, match="33 wide"):
            stack.add(Adapter("u", {}, {"<b>": {"text_encoder": torch.zeros(1, 33)}}))
        assert list(stack) == ["t"]
    assert sd.tokenizer is tokenizer
    assert table.weight is weight
    assert (table.num_embeddings, sd.text_encoder.config.vocab_size) == (vocabulary, vocabulary)
    assert np.array_equal(tiny.picture(sd, "a <fox>"), base)


def test_schedules_and_masks_under_offload_and_after_a_move(sd: Any) -> None:
    from accelerate import cpu_offload

    one = adapter(sd, components=("unet",))
    with AdapterStack(sd) as stack:
        stack.add(one, "0@0,1@1")
        expected = tiny.picture(sd)
    pipe = tiny.sd()
    with AdapterStack(pipe) as stack:
        stack.add(one, "0@0,1@1")
        cpu_offload(pipe.unet, torch.device("cpu"))
        np.testing.assert_allclose(tiny.picture(pipe), expected, atol=1e-5)
    with AdapterStack(sd) as stack:
        stack.add(one, "0@0,1@1")
        sd.to(dtype=torch.float64)
        sd.to(dtype=torch.float32)
        sd.enable_attention_slicing()
        sd.vae.enable_tiling()
        np.testing.assert_allclose(tiny.picture(sd), expected, atol=1e-4)


def test_a_copy_of_a_stacked_model_stands_alone() -> None:
    pipe = Pipe()
    stack = AdapterStack(pipe)
    stack.add(ADAPTERS["a"], 0.8)
    with torch.no_grad():
        expected = pipe.unet(X)
        copied = copy.deepcopy(pipe.unet)
        stack.clear()
        torch.testing.assert_close(copied(X), expected)
