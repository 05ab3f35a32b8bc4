"""What goes wrong on a stack leaves everything as it was: bad schedules, no memory left, another stack."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lora_diffusion import AdapterStack, fusing
from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.lora import Slot
from lora_diffusion.quantize import fingerprint
from tests.small import ADAPTERS, Pipe, Small, X, small_adapter


@pytest.mark.parametrize(
    "weight", [lambda at: math.nan, lambda at: 1 / at, lambda at: "much", {"unet": lambda at: math.inf}]
)
def test_a_schedule_that_has_no_value_changes_nothing(weight: Any) -> None:
    pipe = Pipe()
    stack, base = AdapterStack(pipe), pipe.unet(X)
    with pytest.raises((ConfigError, ZeroDivisionError)):
        stack.add(ADAPTERS["a"], weight)
    assert (len(stack), str(pipe.unet)) == (0, str(Pipe().unet))
    assert torch.equal(pipe.unet(X), base)
    stack.add(ADAPTERS["a"], 0.5)
    ours = pipe.unet(X)
    for change in (lambda: stack.weigh("a", weight), lambda: stack.swap("a", ADAPTERS["training"], weight)):
        with pytest.raises((ConfigError, ZeroDivisionError)):
            change()
    assert stack.weights == {"a": 0.5}
    assert torch.equal(pipe.unet(X), ours)


@pytest.mark.parametrize("action", ["add", "swap", "remove"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_what_fails_half_way_changes_nothing(action: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = AdapterStack(pipe := Pipe())
    for name in ("a", "b"):
        stack.add(small_adapter(name, 3, ord(name)), 0.5)
    ours, pack, calls = pipe.unet(X), Slot.pack, list[int]()

    def full(self: Slot, *args: Any, **kwargs: Any) -> None:
        pack(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == layer:
            raise MemoryError

    monkeypatch.setattr(Slot, "pack", full)
    new = small_adapter("c", 4, 9)
    with pytest.raises(MemoryError):
        stack.add(new) if action == "add" else stack.swap("a", new) if action == "swap" else stack.remove("a")
    assert list(stack) == ["a", "b"]
    assert torch.equal(pipe.unet(X), ours)


def test_fusing_that_fails_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = AdapterStack(pipe := Pipe())
    stack.add(ADAPTERS["a"], 0.5)
    before, ours, write, calls = fingerprint(pipe.unet), pipe.unet(X), fusing.fused_weight, list[int]()

    def full(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return write(*args)

    monkeypatch.setattr(fusing, "fused_weight", full)
    with pytest.raises(MemoryError):
        stack.fuse()
    assert fingerprint(pipe.unet) == before
    assert torch.equal(pipe.unet(X), ours)
    stack.fuse()
    stack.unfuse()
    assert fingerprint(pipe.unet) == before


def test_a_fused_stack_keeps_its_reserve() -> None:
    stack = AdapterStack(pipe := Pipe())
    stack.reserve(4, "all-linear+conv")
    stack.add(ADAPTERS["a"], 0.5)
    stack.fuse()
    ours = pipe.unet(X)
    with pytest.raises(ConfigError, match="unfuse"):
        stack.release()
    assert all(not slot.gate.any() for slot in stack.slots["unet"].values())
    assert torch.equal(pipe.unet(X), ours)


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8"])
def test_a_reserve_is_a_number_of_rows(rank: Any) -> None:
    stack = AdapterStack(pipe := Pipe())
    with pytest.raises(ConfigError, match="at least 1"):
        stack.reserve(rank)
    assert str(pipe.unet) == str(Small())


def test_a_second_stack_leaves_the_first_alone() -> None:
    first, second = AdapterStack(pipe := Pipe()), AdapterStack(pipe)
    first.add(ADAPTERS["a"])
    ours = pipe.unet(X)
    for take in (lambda: second.add(ADAPTERS["training"]), lambda: second.reserve(4), second.clear):
        with pytest.raises(TargetError, match="another stack") if take != second.clear else nullcontext():
            take()
        assert torch.equal(pipe.unet(X), ours)
    first.clear()
    second.add(ADAPTERS["a"])
    assert torch.equal(pipe.unet(X), ours)


def test_a_stack_that_nobody_holds_acts_on_until_the_next_one_takes_it_off() -> None:
    pipe, alone = Pipe(), Pipe()
    AdapterStack(pipe).add(ADAPTERS["a"])
    (stack := AdapterStack(alone)).add(ADAPTERS["a"])
    assert torch.equal(pipe.unet(X), alone.unet(X))
    with pytest.warns(UserWarning, match="'a' of an AdapterStack that is gone"):
        AdapterStack(pipe).add(ADAPTERS["training"])
    stack.swap("a", ADAPTERS["training"])
    assert torch.equal(pipe.unet(X), alone.unet(X))


@pytest.mark.parametrize("take", ["add", "reserve", "clear"])
@pytest.mark.parametrize("how", ["fused", "scheduled", "reserve only"])
def test_what_a_stack_left_goes_to_the_bit_and_is_named(how: str, take: str) -> None:
    pipe = Pipe()
    before = fingerprint(pipe.unet)
    stack, second = AdapterStack(pipe), AdapterStack(pipe)
    stack.reserve(4)
    if how != "reserve only":
        stack.add(ADAPTERS["a"], 0.5 if how == "fused" else "0.5@0,1@1")
    if how == "fused":
        stack.fuse()
    del stack  # at once, as nothing on the pipeline refers to it
    changes = {"add": lambda: second.add(ADAPTERS["training"]), "reserve": lambda: second.reserve(2)}
    with nullcontext() if how == "reserve only" else pytest.warns(UserWarning, match="'a' of an AdapterStack"):
        changes.get(take, second.clear)()
    if take == "add":
        with torch.no_grad():
            AdapterStack(alone := Pipe()).add(ADAPTERS["training"])
            assert torch.equal(pipe.unet(X), alone.unet(X))
    second.clear()
    second.release()
    assert fingerprint(pipe.unet) == before
    assert str(pipe.unet) == str(Small())
    assert not vars(pipe.unet)["_forward_pre_hooks"]


def test_a_pipeline_goes_at_once_with_the_adapters_that_were_left_on_it() -> None:
    pipe = Pipe()
    AdapterStack(pipe).add(ADAPTERS["a"])
    gone = weakref.ref(pipe.unet)
    gc.disable()
    try:
        del pipe
        assert gone() is None
    finally:
        gc.enable()
