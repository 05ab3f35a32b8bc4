"""The stack under random use, compiled, and with adapters it has met: always reversible to the bit."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diffusion import AdapterStack, Region, save_adapter
from lora_diffusion.errors import AdapterMismatchError, LoraDiffusionError, TargetError
from lora_diffusion.lora import Slot
from lora_diffusion.quantize import fingerprint
from tests.small import ADAPTERS, Pipe, Small, X, small_adapter

BROKEN = {fault: small_adapter(fault, 2, 4, fault) for fault in ("shape", "nan", "name")}
WEIGHTS = st.sampled_from([0.0, 1.0, -0.5, 0.8, {"down": 0.3}, "0.5@0-1", [1.0, 0.0], float("nan"), {"dwon": 1.0}])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([*ADAPTERS, *BROKEN]), WEIGHTS),
        st.tuples(st.just("swap"), st.sampled_from([*ADAPTERS, *BROKEN]), WEIGHTS),
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
            elif action == "swap":
                old = next(iter(stack), "nothing")
                stack.swap(old, {**ADAPTERS, **BROKEN}[name], weight)
            elif action == "weigh":
                stack.weigh(name, weight)
            elif action == "remove":
                stack.remove(name)
            else:
                getattr(stack, action)()
        except LoraDiffusionError:
            continue
        if action == "swap":
            expected = {name if n == old else n: weight if n == old else w for n, w in expected.items()}
        elif action in ("add", "weigh"):
            expected[name] = weight
        elif action == "remove":
            del expected[name]
    stack.unfuse()
    assert list(stack.weights.items()) == list(expected.items())
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


class Counting:
    """A back end of `torch.compile` that compiles nothing and counts the graphs it is given."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _inputs: Any) -> Any:
        self.graphs += 1
        return module.forward


def test_no_recompilation_over_weight_changes_and_swaps_within_the_reserve() -> None:
    counting = Counting()
    pipe = Pipe()
    stack = AdapterStack(pipe)
    stack.reserve(8, "all-linear+conv")
    compiled = torch.compile(pipe.unet, backend=counting)
    with torch.no_grad():
        base = compiled(X)
        after_first = counting.graphs
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
        for name, other in (("c.v1", "a"), ("a", "c.v1")):
            stack.swap(name, ADAPTERS[other])
            results.append(compiled(X))
        torch.testing.assert_close(results[-1], results[-3])
        stack.clear()
        results.append(compiled(X))
        assert counting.graphs == after_first
        stack.add(ADAPTERS["a"])
        torch.testing.assert_close(compiled(X), results[0])
        torch.testing.assert_close(pipe.unet(X), results[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[1], base)
    assert torch.equal(results[-1], base)
    stack.clear()
    stack.release()
    assert str(pipe.unet) == str(Small())


MIXES = [1.0, 0.0], [0.2, 0.3], [0.0, 0.5]


@pytest.mark.parametrize(
    "weights", [MIXES, [Region(torch.eye(4), w) for w in (1.0, 0.5, 0.2)]], ids=["lists", "regions"]
)
def test_weights_by_image_and_place_do_not_recompile(weights: Any) -> None:
    counting, pipe = Counting(), Pipe()
    stack = AdapterStack(pipe)
    stack.reserve(8, "all-linear+conv")
    compiled = torch.compile(pipe.unet, backend=counting)
    stack.add(ADAPTERS["a"], weights[0])
    stack.add(ADAPTERS["training"], weights[1])
    with torch.no_grad():
        compiled(X)
        first = counting.graphs
        for turn in range(3):
            stack.weigh_all({"a": weights[turn], "training": weights[turn - 1]})
            torch.testing.assert_close(compiled(X), pipe.unet(X), rtol=1e-4, atol=1e-5)
        stack.swap("a", ADAPTERS["c.v1"])
        torch.testing.assert_close(compiled(X), pipe.unet(X), rtol=1e-4, atol=1e-5)
    assert counting.graphs == first


def test_a_schedule_does_not_recompile() -> None:
    counting = Counting()
    pipe = Pipe()
    pipe.unet = torch.compile(pipe.unet, backend=counting)
    stack = AdapterStack(pipe)
    stack.reserve(8, "all-linear+conv")
    value = [0.0]
    stack.add(ADAPTERS["a"], lambda progress: value[0])
    outs = []
    with torch.no_grad():
        for value[0] in (0.0, 0.5, 1.0):
            outs.append(pipe.unet(X))
            if len(outs) == 1:
                first = counting.graphs
    assert counting.graphs == first
    assert not torch.equal(outs[1], outs[2])


def test_a_known_adapter_is_neither_read_nor_planned_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe()
    stack, file = AdapterStack(pipe), save_adapter(ADAPTERS["a"], tmp_path / "a.safetensors")
    stack.add(file)
    with torch.no_grad():
        expected = pipe.unet(X)
    stack.remove("a")
    monkeypatch.setattr("lora_diffusion.resident.load_adapter", None)
    monkeypatch.setattr("lora_diffusion.stack.fit", None)
    stack.add(file)
    with torch.no_grad():
        assert torch.equal(pipe.unet(X), expected)
    monkeypatch.undo()
    stack.clear()
    file.unlink()
    save_adapter(ADAPTERS["training"], file)
    assert stack.content_hash(stack.add(file)) == ADAPTERS["training"].content_hash


def test_adapters_met_longest_ago_are_forgotten_beyond_the_limit(tmp_path: Any) -> None:
    files = [save_adapter(small_adapter(f"x{i}", 2, i), tmp_path / f"x{i}.safetensors") for i in range(4)]
    stack = AdapterStack(pipe := Pipe())
    stack.add(files[0])
    stack.residents.limit = 2 * sum(t.nbytes for *_, layer in stack["x0"] for t in layer.tensors.values())
    with torch.no_grad():
        expected = pipe.unet(X)
    held = [weakref.ref(stack["x0"])]
    for old, new in ((0, 1), (1, 2), (2, 1), (1, 3)):
        held.append(weakref.ref(stack[stack.swap(f"x{old}", files[new])]))
    assert [one() is None for one in held] == [True, False, True, False, False]  # x0, x1, x2, x1, x3
    stack.swap("x3", files[0])
    with torch.no_grad():
        assert torch.equal(pipe.unet(X), expected)
    stack.clear()
    stack.residents.limit = 0
    with pytest.raises(AdapterMismatchError):  # a file that does not fit is not kept either
        stack.add(save_adapter(BROKEN["shape"], tmp_path / "bad.safetensors"))
    gone = weakref.ref(stack.residents.read(tmp_path / "bad.safetensors"))
    stack.add(files[1])
    assert gone() is None


def test_swapping_equal_ranks_copies_rows_and_changes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [small_adapter(f"x{i}", 2, 30 + i) for i in range(5)]
    stack, slot = AdapterStack(pipe := Pipe()), pipe.unet.up_blocks[0]["to_out"]
    for one in made[:4]:
        stack.add(one, 0.5)
    for new in (made[4], made[1]):  # met, so that the next time is by copying alone
        stack.swap("x1" if "x1" in list(stack) else "x4", new)
    places = (slot.adapters.down.data_ptr(), slot.adapters.up.data_ptr())
    packed, pack = list[Slot](), Slot.pack
    monkeypatch.setattr(Slot, "pack", lambda self, *given, **more: (packed.append(self), pack(self, *given, **more)))
    for turn in range(4):
        old, new = (made[1], made[4]) if turn % 2 == 0 else (made[4], made[1])
        with torch.inference_mode(turn > 1):
            assert stack.swap(old.name, new, None if turn else {"down": 0.3}) == new.name
        assert list(stack) == ["x0", new.name, "x2", "x3"]
        assert stack.weights[new.name] == {"down": 0.3}
        assert (slot.adapters.down.data_ptr(), slot.adapters.up.data_ptr()) == places
        assert not any(one is slot.adapters for one in packed)
        with torch.no_grad():
            other = AdapterStack(fresh := Pipe())
            for name in reversed(list(stack)):
                other.add(next(one for one in made if one.name == name), stack.weights[name])
            assert torch.equal(pipe.unet(X), fresh.unet(X))
    for wrong, error in (("x9", "no adapter 'x9'"), ("x1", "is on already")):
        with pytest.raises(TargetError, match=error):
            stack.swap(wrong, made[0])
    with pytest.raises(AdapterMismatchError):
        stack.swap("x0", BROKEN["shape"])
    assert list(stack) == ["x0", "x1", "x2", "x3"]


def test_a_model_that_is_cast_later_computes_what_one_cast_before_does() -> None:
    late, early = Pipe(), Pipe()
    early.unet.bfloat16()
    for pipe in (late, early):
        AdapterStack(pipe).add(ADAPTERS["a"], 0.8123)
    late.unet.bfloat16()
    with torch.no_grad():
        assert torch.equal(late.unet(X.bfloat16()), early.unet(X.bfloat16()))


def test_files_are_read_inside_and_outside_of_inference_mode(tmp_path: Any) -> None:
    path = save_adapter(ADAPTERS["a"], tmp_path / "a.safetensors")
    stack, other = AdapterStack(pipe := Pipe()), AdapterStack(fresh := Pipe())
    with torch.inference_mode():
        stack.add(path)
    stack.weigh("a", 0.3)
    other.add(path, 0.3)
    assert torch.equal(pipe.unet(X), fresh.unet(X))


def test_a_stack_made_in_inference_mode_is_turned_outside_where_a_component_has_no_adapter() -> None:
    pipe = Pipe()
    vars(pipe)["vae"] = torch.nn.Linear(2, 2)
    pipe.__class__ = type("Two", (Pipe,), {"components": property(vars)})
    before = fingerprint(pipe.unet)
    with torch.inference_mode():
        stack = AdapterStack(pipe)
        stack.add(ADAPTERS["a"])
    stack.weigh("a", 0.3)
    stack.fuse()
    stack.unfuse()
    stack.clear()
    assert fingerprint(pipe.unet) == before


def test_a_tensor_written_in_place_is_seen() -> None:
    stack, one = AdapterStack(Pipe()), small_adapter("w", 2, 9)
    stack.add(one)
    before = stack.content_hash("w")
    stack.remove("w")
    one.layers["unet"]["up_blocks.0.to_out"].tensors["up"].fill_(float("nan"))
    with pytest.raises(AdapterMismatchError, match="not finite"):
        stack.add(one)
    one.layers["unet"]["up_blocks.0.to_out"].tensors["up"].fill_(1.0)
    assert stack.content_hash(stack.add(one)) != before


def test_a_copy_of_a_stacked_model_stands_alone() -> None:
    pipe = Pipe()
    stack = AdapterStack(pipe)
    stack.add(ADAPTERS["a"], 0.8)
    with torch.no_grad():
        expected = pipe.unet(X)
        copied = copy.deepcopy(pipe.unet)
        stack.clear()
        torch.testing.assert_close(copied(X), expected)
