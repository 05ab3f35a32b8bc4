"""Rows in one tensor: arranged in place they are what a fresh tensor would hold."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_diffusion import Adapter, AdapterMismatchError, AdapterStack, LayerAdapter
from lora_diffusion.packing import arrange, repacked, uncollected
from tests.small import ADAPTERS, Pipe, X, small_adapter

KIND = (torch.float32, torch.device("cpu"))
TOKENS = [object() for _ in range(6)]
RANKS = [1, 3, 2, 4, 1, 2]
HISTORIES = st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=2, max_size=6)  # a block may be there twice


def rows_of(number: int) -> torch.Tensor:
    """The rows of one block, different from all others."""
    return number * 10 + torch.arange(RANKS[number])[:, None].expand(-1, 2).float()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(HISTORIES, st.booleans())
def test_any_history_of_blocks_ends_in_the_same_rows(history: list[list[int]], backwards: bool) -> None:
    held: torch.Tensor | None = None
    before: list[tuple[object, int]] = []
    for step, numbers in enumerate(history):
        order = sorted(numbers, reverse=backwards and step % 2 == 1)  # now and then in another order
        blocks = [(TOKENS[n], RANKS[n]) for n in order]
        shape = (sum(RANKS[n] for n in order) + step % 3, 2)
        held = repacked(held, shape, KIND, before, blocks, lambda index, order=order: rows_of(order[index]))
        assert torch.equal(held, torch.cat([*map(rows_of, order), torch.zeros(step % 3, 2)]))
        before = blocks


def test_one_adapter_may_be_on_under_two_names() -> None:
    once, other = small_adapter("once", 4, 1), small_adapter("other", 2, 10)
    pipe, fresh = Pipe(), Pipe()
    stack, plain = AdapterStack(pipe), AdapterStack(fresh)
    for one in (stack, plain):
        one.reserve(8, "all-linear+conv")
    stack.add(other, 0.3)
    stack.add(once, 0.5)
    stack.swap("other", once, 0.7, name="again")  # its rows stay where they are and come where the other's were
    plain.add(once, 1.2)
    assert torch.allclose(pipe.unet(X), fresh.unet(X), atol=1e-4)
    stack.remove("once")
    plain.weigh("once", 0.7)
    assert torch.equal(pipe.unet(X), fresh.unet(X))


def test_what_is_there_is_not_written_again() -> None:
    held = [(TOKENS[n], RANKS[n]) for n in (0, 1, 3)]
    plan = arrange(held, [(TOKENS[n], RANKS[n]) for n in (0, 1, 2, 3)])
    assert plan.new == {2: 4}
    assert plan.kept == [(0, 0, 4), (4, 6, 4)]  # one run that stays, one that makes room
    gone = arrange(held, [(TOKENS[n], RANKS[n]) for n in (1, 3)])
    assert (gone.new, gone.kept) == ({}, [(1, 0, 7)])


def test_adding_reads_only_what_is_new() -> None:
    pipe, fresh = Pipe(), Pipe()
    stack, other = AdapterStack(pipe), AdapterStack(fresh)
    for i in range(6):
        one = small_adapter(f"x{i}", 2, 20 + i)
        stack.content_hash(stack.add(one))  # by which it has its place among the others
        for *_, layer in one:
            for tensor in layer.tensors.values():
                tensor.data.fill_(float("nan"))  # nobody looks at it again
    for i in reversed(range(6)):
        other.add(small_adapter(f"x{i}", 2, 20 + i))
    assert torch.equal(pipe.unet(X), fresh.unet(X))


def test_memory_is_used_again_and_given_back() -> None:
    stack = AdapterStack(pipe := Pipe())
    layer = pipe.unet.up_blocks[0]["to_out"]
    places, sizes = [], []
    for i in range(8):
        stack.add(small_adapter(f"x{i}", 2, 20 + i))
        places.append(layer.adapters.down.data_ptr())
        sizes.append(layer.adapters.down.untyped_storage().nbytes() // (4 * layer.in_features))
    assert sizes == [2, 6, 6, 12, 12, 12, 21, 21]
    assert places[3] == places[4] == places[5]
    for i in range(7):
        stack.remove(f"x{i}")
    assert layer.adapters.down.untyped_storage().nbytes() <= 4 * 4 * layer.in_features


def test_rows_that_were_rounded_on_the_way_are_written_again() -> None:
    pipe, plain = Pipe(), Pipe()
    for one in (pipe, plain):
        one.unet.bfloat16()
    stack = AdapterStack(pipe)
    stack.add(ADAPTERS["a"])
    for one in (pipe, plain):
        one.unet.float()
    stack.add(ADAPTERS["training"])
    other = AdapterStack(plain)
    other.add(ADAPTERS["training"])
    other.add(ADAPTERS["a"])
    assert torch.equal(pipe.unet(X), plain.unet(X))


def test_rows_that_were_laid_out_in_another_precision_are_read_anew() -> None:
    made = [small_adapter(f"x{i}", 2, 40 + i) for i in range(2)]
    stack = AdapterStack(pipe := Pipe())
    pipe.unet.bfloat16()
    stack.add(made[0])
    for old, new in ("01", "10", "01", "10"):
        stack.swap(f"x{old}", made[int(new)])
    pipe.unet.float()
    stack.swap("x0", made[1])
    other = AdapterStack(plain := Pipe())
    plain.unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    other.add(made[1])
    assert torch.equal(pipe.unet(X), plain.unet(X))


def test_an_adapter_that_was_alone_in_one_memory_makes_room_for_another() -> None:
    def on_one_layer(seed: int) -> Adapter:
        random = torch.Generator().manual_seed(seed)
        pair = {name: torch.randn(shape, generator=random) for name, shape in (("down", (4, 16)), ("up", (16, 4)))}
        return Adapter(f"x{seed}", {"unet": {"down_blocks.0.to_q": LayerAdapter("lora", pair, 4.0)}})

    def pipeline() -> Pipe:
        pipe = Pipe()
        pipe.unet.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(16, 16, bias=False)})])
        nn.init.zeros_(pipe.unet.down_blocks[0]["to_q"].weight)
        return pipe

    made = [on_one_layer(seed) for seed in range(3)]
    stack, other = AdapterStack(pipe := pipeline()), AdapterStack(plain := pipeline())
    layer, x = pipe.unet.down_blocks[0]["to_q"], torch.eye(16)
    stack.add(made[0])
    for _ in range(2):  # met, and so swapped by copying alone
        stack.swap("x0", made[1])
        stack.swap("x1", made[0])
    assert layer.adapters.down.untyped_storage().data_ptr() == layer.adapters.up.untyped_storage().data_ptr()
    stack.add(made[2])
    other.add(made[2])
    other.add(made[0])
    with torch.no_grad():
        assert torch.equal(layer(x), plain.unet.down_blocks[0]["to_q"](x))
        assert not torch.equal(layer.adapters.down[4:], layer.adapters.up[:4])


@pytest.mark.parametrize("inside", [True, False])
def test_adapters_come_and_turn_inside_and_outside_of_inference_mode(inside: bool) -> None:
    pipe, plain = Pipe(), Pipe()
    stack, other = AdapterStack(pipe), AdapterStack(plain)
    with torch.inference_mode(inside):
        stack.add(ADAPTERS["a"])
    with torch.inference_mode(not inside):
        stack.add(ADAPTERS["training"], 0.5)
        stack.weigh("a", 0.3)
    stack.remove("training")
    other.add(ADAPTERS["a"], 0.3)
    with torch.no_grad():
        assert torch.equal(pipe.unet(X), plain.unet(X))


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_afterwards_as_before_whatever_happens(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with uncollected():
            assert not gc.isenabled()
        with pytest.raises(AdapterMismatchError):
            AdapterStack(Pipe()).add(small_adapter("a", 2, 1, fault="shape"))
        assert gc.isenabled() == enabled
        AdapterStack(Pipe()).add(small_adapter("a", 2, 1))
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
