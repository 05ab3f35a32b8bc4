"""What happens to a pipeline between two changes of its stack: interrupts, copies, casts, stacks that go together."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterStack, Region
from lora_diffusion.errors import TargetError
from lora_diffusion.quantize import fingerprint
from tests import tiny
from tests.small import ADAPTERS, Pipe, Small, X, small_adapter
from tests.test_gates import adapter as on_linear

OTHER = small_adapter("other", 2, 9)  # the ranks of "a"
MANY = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(6))  # enough tokens for a merged weight


class Interrupted(nn.Linear):
    """Ctrl-C, while it computes."""

    def forward(self, input: Tensor) -> Tensor:
        raise KeyboardInterrupt


def part(name: str, block: str) -> Adapter:
    """What one of the adapters has on the layers of a block."""
    layers = ADAPTERS[name].layers["unet"]
    return Adapter(name, {"unet": {layer: one for layer, one in layers.items() if layer.startswith(block)}})


def drawn(pipe: Pipe, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return pipe.unet(x)


def alone(*adapters: Adapter) -> Tensor:
    """What a fresh pipeline draws with these."""
    stack = AdapterStack(pipe := Pipe())
    for adapter in adapters:
        stack.add(adapter)
    return drawn(pipe)


def interrupt(pipe: Pipe) -> None:
    layer: Any = pipe.unet.get_submodule("down_blocks.0.to_q")
    layer.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        drawn(pipe, MANY)
    layer.__class__ = nn.Linear


@pytest.mark.parametrize("after", ["another run", "clear", "fuse", "move"])
@pytest.mark.parametrize("weight", [0.7, [0.7, 0.2]])
def test_an_interrupted_run_leaves_no_merged_weight_behind(weight: Any, after: str) -> None:
    stack = AdapterStack(pipe := Pipe())
    before, frozen = fingerprint(pipe.unet), pipe.unet.get_submodule("down_blocks.0.to_q").weight
    stack.add(ADAPTERS["a"], weight)
    expected = drawn(pipe, MANY)
    interrupt(pipe)
    if after == "another run":
        assert torch.equal(drawn(pipe, MANY), expected)
    if after == "move":
        pipe.unet.double()
        assert drawn(pipe, MANY.double()).dtype == torch.float64
        pipe.unet.float()
    if after == "fuse":
        stack.weigh("a", 0.7)
        stack.fuse()
        torch.testing.assert_close(drawn(pipe, MANY)[:1], expected[:1])
    stack.clear()
    assert pipe.unet.get_submodule("down_blocks.0.to_q").weight is frozen
    assert fingerprint(pipe.unet) == before


@pytest.mark.parametrize("fused", [False, True])
def test_stacks_that_go_together_all_go_to_the_bit(fused: bool) -> None:
    pipe = Pipe()
    before, base = fingerprint(pipe.unet), drawn(pipe)
    first, second = AdapterStack(pipe), AdapterStack(pipe)
    first.add(part("a", "down"))
    second.add(part("training", "up"), 0.4 if fused else "0@0,1@1")
    if fused:
        first.fuse()
        second.fuse()
    del first, second
    with pytest.warns(UserWarning, match="'a', 'training' of an AdapterStack"):
        AdapterStack(pipe)
    assert torch.equal(drawn(pipe), base)
    assert (fingerprint(pipe.unet), str(pipe.unet)) == (before, str(Small()))
    assert not vars(pipe.unet)["_forward_pre_hooks"]


def copied(pipe: Pipe, stack: AdapterStack) -> tuple[Pipe, AdapterStack]:
    return copy.deepcopy((pipe, stack))


@pytest.mark.parametrize("first", ["pipeline", "stack"])
@pytest.mark.parametrize(
    "weight", ["0@0,1@1", [0.2, 0.9], Region(torch.eye(8), "1@0,0@1")], ids=["steps", "list", "place"]
)
def test_what_changes_with_the_call_is_copied_too(weight: Any, first: str, sd: Any) -> None:
    stack = AdapterStack(sd)
    stack.add(on_linear(sd), weight)
    expected = tiny.picture(sd, ["a fox", "a hare"], output_type="latent")
    if first == "stack":
        other, theirs = copy.deepcopy((stack, sd))
    else:
        theirs, other = copy.deepcopy((sd, stack))
    stack.weigh("a", 0.1)
    assert torch.equal(tiny.picture(theirs, ["a fox", "a hare"], output_type="latent"), expected)
    stack.clear()
    assert torch.equal(tiny.picture(theirs, ["a fox", "a hare"], output_type="latent"), expected)
    other.clear()
    assert (str(theirs.unet), fingerprint(theirs.unet)) == (str(sd.unet), fingerprint(sd.unet))
    assert not vars(theirs.unet)["_forward_pre_hooks"]


def test_a_model_copied_alone_takes_no_pipeline_along(sd: Any) -> None:
    stack = AdapterStack(sd)
    stack.add(on_linear(sd), "0@0,1@1")
    (hook,) = copy.deepcopy(sd.unet)._forward_pre_hooks.values()
    assert hook.__self__.clock.pipe is sd
    assert hook.__self__ is not stack._dials["unet"]


def given_other_memory(pipe: Pipe, stack: AdapterStack) -> tuple[Pipe, AdapterStack]:
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    return pipe, stack


@pytest.mark.parametrize("between", [copied, given_other_memory])
def test_rows_are_copied_to_where_the_slots_are(between: Callable[..., tuple[Pipe, AdapterStack]]) -> None:
    stack = AdapterStack(pipe := Pipe())
    stack.add(ADAPTERS["a"], name="on")
    for adapter in (OTHER, ADAPTERS["a"]):
        stack.swap("on", adapter, name="on")
    theirs, other = between(pipe, stack)
    other.swap("on", OTHER, name="on")
    assert torch.equal(drawn(theirs), alone(OTHER))
    assert theirs is pipe or torch.equal(drawn(pipe), alone(ADAPTERS["a"]))


def test_what_a_cast_rounded_is_written_anew_on_every_layer_with_the_next_change() -> None:
    stack = AdapterStack(pipe := Pipe())
    frozen = copy.deepcopy(pipe.unet.state_dict())
    stack.add(part("a", "down"))
    stack.add(part("training", "up"))
    pipe.unet.to(torch.bfloat16).float()
    pipe.unet.load_state_dict(frozen, strict=False)
    stack.swap("training", part("c.v1", "up"))
    assert torch.equal(drawn(pipe), alone(part("a", "down"), part("c.v1", "up")))


def test_tokens_that_a_stack_left_go_from_every_pipeline_of_these_components() -> None:
    pipe = tiny.sd()
    own, rows = pipe.tokenizer, pipe.text_encoder.get_input_embeddings().weight
    vectors = {"<new>": {"text_encoder": torch.ones(1, rows.shape[1])}}
    AdapterStack(pipe).add(Adapter("words", {}, embeddings=vectors))
    assert pipe.tokenizer is not own
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.warns(UserWarning, match="'words' of an AdapterStack"):
        AdapterStack(other)
    assert (pipe.tokenizer, other.tokenizer) == (own, own)
    assert pipe.text_encoder.get_input_embeddings().weight is rows


def test_a_model_can_be_saved_whole_with_what_a_stack_left() -> None:
    AdapterStack(pipe := Pipe()).add(ADAPTERS["a"])
    torch.save(pipe.unet, file := io.BytesIO())
    file.seek(0)
    other = Pipe()
    other.unet = torch.load(file, weights_only=False)
    assert torch.equal(drawn(other), drawn(pipe))
    with pytest.warns(UserWarning, match="'a' of an AdapterStack"):
        AdapterStack(other)
    assert torch.equal(drawn(other), drawn(Pipe()))


class Halved(nn.Linear):
    """Not the product of its weight alone."""

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.weight.t()) * 0.5 + self.bias


@pytest.mark.parametrize("weight", [0.7, [0.7, 0.2]])
def test_layers_of_a_class_of_their_own_compute_the_same_for_many_tokens_as_for_few(weight: Any) -> None:
    layer: Any = (pipe := Pipe()).unet.get_submodule("down_blocks.0.to_q")
    layer.__class__ = Halved
    stack = AdapterStack(pipe)
    base = {x: layer(x) for x in (torch.randn(2, 3, 8), torch.randn(2, 400, 8))}
    stack.add(part("a", "down"), weight)
    share = part("a", "down").layers["unet"]["down_blocks.0.to_q"]
    delta = (share.tensors["up"] @ share.tensors["down"]).t() * (share.alpha or 2) / 2
    for x, out in base.items():
        with torch.no_grad():
            turned = torch.tensor(weight).reshape(-1, 1, 1)
            torch.testing.assert_close(layer(x), out + x @ delta * turned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight", [0.7, {"unet": "0@0,1@1", "text_encoder": 0.5}])
def test_a_pipeline_copied_without_its_stack_gives_up_what_it_carries_to_its_own(
    weight: Any, fused: bool, sd: Any
) -> None:
    trees, marks = ([f(getattr(sd, c)) for c in ("unet", "text_encoder")] for f in (str, fingerprint))
    base, vocabulary, stack = tiny.picture(sd, "a <fox>"), len(sd.tokenizer), AdapterStack(sd)
    vectors = {"<fox>": {"text_encoder": torch.ones(2, 32)}}
    stack.add(Adapter("a", on_linear(sd).layers, vectors), 0.7 if fused else weight)
    if fused:
        stack.fuse()
    drawn = tiny.picture(sd, "a <fox>")
    alone = copy.deepcopy(sd)
    assert (tiny.picture(alone, "a <fox>") == drawn).all()
    with pytest.warns(UserWarning, match="'a' of an AdapterStack"):
        other = AdapterStack(alone)
    assert (tiny.picture(alone, "a <fox>") == base).all()
    assert [f(getattr(alone, c)) for f in (str, fingerprint) for c in ("unet", "text_encoder")] == [*trees, *marks]
    assert not vars(alone.unet)["_forward_pre_hooks"]
    assert len(alone.tokenizer) == vocabulary
    other.add(on_linear(sd), 0.7)
    assert (tiny.picture(sd, "a <fox>") == drawn).all()
    stack.clear()
    assert (tiny.picture(sd, "a <fox>") == base).all()


def test_a_copy_that_carries_tokens_alone_gives_them_up(sd: Any) -> None:
    stack = AdapterStack(sd)
    stack.add(Adapter("words", {}, {"<fox>": {"text_encoder": torch.ones(1, 32)}}))
    alone, copies = copy.deepcopy(sd), copy.deepcopy((sd, stack))
    with pytest.warns(UserWarning, match="tokens of text_encoder"):
        AdapterStack(alone)
    assert len(alone.tokenizer) == len(sd.tokenizer) - 1
    AdapterStack(copies[0])  # holds nothing yet, and what is on is the copied stack's
    assert len(copies[0].tokenizer) == len(sd.tokenizer)


def test_tokens_of_two_stacks_on_one_encoder_are_refused(sd: Any) -> None:
    other = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    first, second, third = AdapterStack(sd), AdapterStack(sd), AdapterStack(other)
    first.add(Adapter("one", {}, {"<one>": {"text_encoder": torch.ones(1, 32)}}))
    held, table = sd.tokenizer, sd.text_encoder.get_input_embeddings().weight
    for stack in (second, third):  # theirs would go with the first's, or lie in the same rows of the table
        with pytest.raises(TargetError, match="tokens of another stack"):
            stack.add(Adapter("two", {}, {"<two>": {"text_encoder": torch.ones(1, 32)}}))
    assert (sd.tokenizer, sd.text_encoder.get_input_embeddings().weight) == (held, table)
    first.clear()
    second.add(Adapter("two", {}, {"<two>": {"text_encoder": torch.ones(1, 32)}}))
    assert "<two>" in sd.tokenizer.get_vocab()


@pytest.mark.parametrize("keep_vars", [False, True])
@pytest.mark.parametrize("weight", [0.7, [0.7, 0.2]])
def test_what_is_saved_after_an_interrupt_is_the_frozen_weight(weight: Any, keep_vars: bool) -> None:
    stack = AdapterStack(pipe := Pipe())
    stack.add(ADAPTERS["a"], weight)
    interrupt(pipe)
    saved = pipe.unet.state_dict(keep_vars=keep_vars)
    assert torch.equal(saved["down_blocks.0.to_q.weight"], Small().down_blocks[0]["to_q"].weight)
    assert isinstance(saved["down_blocks.0.to_q.weight"], nn.Parameter) == keep_vars


def test_a_stack_after_a_cleared_one_collects_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop the last stack still has its name while the next is made; a collection takes up to half a second."""
    pipe, collected = Pipe(), list[None]()
    monkeypatch.setattr("lora_diffusion.leaving.gc.collect", lambda: collected.append(None))
    for name in ADAPTERS:
        with AdapterStack(pipe) as stack:
            stack.add(ADAPTERS[name])
    assert not collected
    stack.add(ADAPTERS["a"])
    AdapterStack(pipe)
    assert len(collected) == 1


def test_a_stack_that_only_a_cycle_of_references_holds_is_gone_for_the_next() -> None:
    pipe, cycle = Pipe(), dict[str, Any]()
    cycle["stack"], cycle["self"] = AdapterStack(pipe), cycle
    cycle["stack"].add(ADAPTERS["a"])
    del cycle
    with pytest.warns(UserWarning, match="'a' of an AdapterStack"):
        stack = AdapterStack(pipe)
    stack.add(ADAPTERS["training"])
    assert torch.equal(drawn(pipe), alone(ADAPTERS["training"]))
