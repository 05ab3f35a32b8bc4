"""The stack in use: fused, with learned tokens, offloaded, moved and cast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lora_diffusion import Adapter, AdapterStack
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.methods import METHODS, is_dense, new_method
from lora_diffusion.quantize import fingerprint, quantize
from tests import tiny
from tests.small import ADAPTERS, Pipe, X
from tests.test_gates import adapter


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


@pytest.mark.parametrize("method", [name for name in METHODS if is_dense(name) and name != "set"])
def test_any_method_is_fused_as_the_stack_computes_it(method: str) -> None:
    pipe = Pipe()
    generator = torch.Generator().manual_seed(4)
    if method == "norm":
        pipe.unet.up_blocks[0]["to_out"] = torch.nn.Sequential(torch.nn.LayerNorm(12), pipe.unet.up_blocks[0]["to_out"])
    layers = {n: m for n, m in pipe.unet.named_modules() if METHODS[method].supports(m)}
    new = {n: new_method(method, rank=2, bias=method == "full").fresh(m, generator) for n, m in layers.items()}
    for tensor in (t for one in new.values() for t in one.tensors.values() if t.is_floating_point()):
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    before = fingerprint(pipe.unet)
    with AdapterStack(pipe) as stack, torch.no_grad():
        stack.add(Adapter("other", {"unet": new}), 0.7)
        if method != "norm":
            stack.add(ADAPTERS["a"], -0.4)
        apart = pipe.unet(X)
        stack.fuse()
        torch.testing.assert_close(pipe.unet(X), apart, rtol=1e-4, atol=1e-4)
        stack.unfuse()
        assert fingerprint(pipe.unet) == before
        assert torch.equal(pipe.unet(X), apart)
        stack.bake()
        torch.testing.assert_close(pipe.unet(X), apart, rtol=1e-4, atol=1e-4)
    assert not [m for m in pipe.unet.modules() if hasattr(m, "adapters")]


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
        with pytest.raises(AdapterMismatchError, match="'<fox>_1' is known already"):  # the second vector's name
            stack.add(Adapter("u", {}, {"<fox>_1": {"text_encoder": vectors}}))
        one = {"text_encoder": vectors[:1]}
        with pytest.raises(AdapterMismatchError, match="'<b>_1' is known already"):
            stack.add(Adapter("u", {}, {"<b>": {"text_encoder": vectors}, "<b>_1": one}))
        assert list(stack) == ["t"]
        stack.swap("t", Adapter("v", {}, {"<fox>": {"text_encoder": 2 * vectors}}))  # its own token may come again
        assert torch.equal(sd.text_encoder.get_input_embeddings().weight[ids], 2 * vectors)
        stack.swap("v", adapter(sd))
        assert len(sd.tokenizer) == vocabulary
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


def test_adding_and_turning_while_offloaded() -> None:
    from accelerate import cpu_offload

    pipe, plain = Pipe(), Pipe()
    stack, other = AdapterStack(pipe), AdapterStack(plain)
    for one in (stack, other):
        one.add(ADAPTERS["a"])
    cpu_offload(pipe.unet, torch.device("cpu"))
    changes: list[Any] = [
        lambda s: s.add(ADAPTERS["training"], 0.5),
        lambda s: s.weigh("a", -1.0),
        lambda s: s.remove("training"),
        lambda s: s.weigh("a", "0.3@0-1"),
    ]
    with torch.no_grad():
        for change in changes:
            change(stack)
            change(other)
            torch.testing.assert_close(pipe.unet(X), plain.unet(X), rtol=1e-4, atol=1e-5)
        stack.clear()
        torch.testing.assert_close(pipe.unet(X), Pipe().unet(X))
