"""What is made again in backward: the same gradients to the bit, less kept, and left alone where it would not hold."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion import LoRA, Recompute, attach
from lora_diffusion.families import family_of
from lora_diffusion.quantize import Precision, quantize
from tests import tiny
from tests.families.test_training import PIPELINES

Gradients = list[Tensor]


def gradients(model: nn.Module, loss: Callable[[], Tensor], *, on: bool) -> Gradients:
    """Of all that is trained, after one step that ran forward with `Recompute` or without."""
    model.zero_grad()
    with Recompute() if on else contextlib.nullcontext():
        made = loss()
    made.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def same(model: nn.Module, loss: Callable[[], Tensor]) -> bool:
    """Whether gradients are those without it, to the bit."""
    plain, again = gradients(model, loss, on=False), gradients(model, loss, on=True)
    return len(plain) == len(again) > 0 and all(map(torch.equal, plain, again))


def kept(model: nn.Module, loss: Callable[[], Tensor], *, on: bool) -> int:
    """Bytes that autograd keeps from forward to backward, each storage once, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(model, loss, on=on)
    return sum(storage.nbytes() for storage in storages.values())


def trained(model: nn.Module, targets: str = "attention+ff", **more: Any) -> None:
    """Slots on `model` that do something."""
    for slot in attach(model, LoRA(4, **more), targets).slots.values():
        slot.train()
        nn.init.normal_(slot.up, std=0.1)


def after(module: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> None:
    """Have `hook` called with what comes out of `module`."""
    module.register_forward_hook(lambda module, args, out: hook(out))  # type: ignore[arg-type, return-value]


def step_of(name: str, precision: Precision) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The denoiser of a tiny pipeline, frozen in `precision`, and its loss on two pictures."""
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    with torch.no_grad():
        conditioning = family.encode_prompts(pipe, ["a red fox", "a hen"])
        latents = torch.randn_like(family.encode_pictures(pipe, torch.rand(2, 3, 32, 32)))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    denoiser: nn.Module = getattr(pipe, family.denoiser)
    quantize(denoiser.to(dtype), precision, compute_dtype=dtype)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in conditioning.items()}
    times = torch.tensor([0.4, 0.4] if family.process == "flow" else [400.0, 400.0])
    return denoiser, lambda: family.predict(denoiser, latents.to(dtype), times, given).float().square().mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize(
    ("name", "share"),
    [("sd", 0.82), ("sd3", 0.76), ("flux", 0.75), ("flux2", 0.73), ("z-image", 0.82), ("pixart-sigma", 0.86)],
)
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(name: str, share: float, precision: Precision) -> None:
    model, loss = step_of(name, precision)
    trained(model)
    assert same(model, loss)
    assert kept(model, loss, on=True) < share * kept(model, loss, on=False)


@pytest.mark.parametrize("name", ["sd", "flux", "qwen-image", "sana"])
def test_adapters_on_the_modulation_too(name: str) -> None:
    """So that scales have gradients, and products with them keep the normalised tokens."""
    model, loss = step_of(name, "bf16")
    trained(model, "all-linear")
    assert same(model, loss)


def test_a_u_net_keeps_no_output_of_layernorm_and_no_gelu_and_no_product_of_it(sd: StableDiffusionPipeline) -> None:
    model = sd.unet
    trained(model)
    norms: list[int] = []
    products: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | GEGLU):
            into = norms if isinstance(module, nn.LayerNorm) else products
            after(module, lambda out, into=into: into.append(out.nbytes))
    loss = lambda: tiny.predict(model, torch.float32).square().mean()  # noqa: E731
    less = kept(model, loss, on=False) - kept(model, loss, on=True)
    calls = len(norms) // 2
    # the input of the first has no gradient, so nothing else keeps that
    assert less == sum(norms[1:calls]) + 2 * sum(products[: calls // 3])


def test_what_several_layers_share_is_made_once(sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(sd.unet)
    with Recompute():
        loss = tiny.predict(sd.unet, torch.float32).square().mean()
    calls: list[int] = []
    true, gelu = torch.layer_norm, sum(isinstance(module, GEGLU) for module in sd.unet.modules())
    monkeypatch.setattr(torch, "layer_norm", lambda *args: calls.append(1) or true(*args))
    loss.backward()
    assert len(calls) == 3 * gelu - 1


@pytest.mark.parametrize("down", ["trained", "frozen"])
def test_random_masks_in_layers_and_in_adapters(down: str) -> None:
    model = tiny.sd(dropout=0.3).unet.train()
    for slot in attach(model, LoRA(4, freeze_down=down == "frozen"), "attention+ff", dropout=0.2).slots.values():
        nn.init.normal_(slot.up, std=0.1)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return tiny.predict(model, torch.float32).square().mean()

    assert same(model, loss)


class Block(nn.Module):
    """A normalised tensor that meets a layer with an adapter, and what is done to it on the way."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.between, self.first, self.norm, self.proj = between, nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(self.between(self.norm(self.first(x)))).chunk(2, dim=-1)
        return self.last(a * F.gelu(b))


def block(between: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Block, Callable[[], Tensor]]:
    model, x = Block(between), torch.randn(2, 5, 8)
    trained(model, "*")
    return model, lambda: model(x).square().mean()


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    out = x + shift
    shift.add_(1.0)
    return out


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.silu(x.mul_(2.0), inplace=True),
        lambda x: x + torch.arange(8.0),
        lambda x: torch.cat([x[:1], x[1:]]) * torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1)),
        lambda x: x.float() + x.sigmoid(),
        lambda x: x.view(10, 8).view(2, 5, 8),
        lambda x: F.silu(x) * x.mean(1, keepdim=True),
        lambda x: _shifted(x, torch.ones(8)),
    ],
)
def test_whatever_is_done_on_the_way(between: Callable[[Tensor], Tensor]) -> None:
    assert same(*block(between))


def test_hooks_and_changed_numbers_of_a_norm() -> None:
    model, loss = block()
    model.norm.weight.data.normal_()
    after(model.norm, lambda out: out * 3.0)
    assert same(model, loss)


def test_what_would_keep_more_is_not_made_again() -> None:
    model, _ = block()
    x, *others = (torch.randn(2, 5, 8) for _ in range(3))
    loss = lambda: model.proj(sum(others, model.norm(model.first(x)))).square().mean()  # noqa: E731
    assert kept(model, loss, on=True) == kept(model, loss, on=False)


def test_a_kept_tensor_that_was_written_to_is_an_error_and_no_wrong_gradient() -> None:
    model, _ = block()
    first: list[Tensor] = []
    after(model.first, first.append)
    with Recompute():
        loss = model(torch.randn(2, 5, 8)).square().mean()
    first[0].detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_made_again_may_be_written_to_afterwards() -> None:
    """Its own numbers are needed no more."""
    seen: list[Tensor] = []
    model, loss = block(lambda x: seen.append(x) or x)
    plain = gradients(model, loss, on=False)
    model.zero_grad()
    with Recompute():
        made = loss()
    seen[-1].data.zero_()
    made.backward()
    assert all(map(torch.equal, plain, [p.grad for p in model.parameters() if p.grad is not None]))


@pytest.mark.parametrize("how", ["within", "twice", "under autocast"])
def test_backward_run_in_other_ways(how: str) -> None:
    model, loss = block()
    found: list[Gradients] = []
    for on in (False, True):
        model.zero_grad()
        with contextlib.ExitStack() as entered:
            entered.enter_context(Recompute() if on else contextlib.nullcontext())
            made = loss()
            if how != "within":
                entered.close()
            if how == "under autocast":
                entered.enter_context(torch.autocast("cpu", torch.bfloat16))
            made.backward(retain_graph=how == "twice")
            if how == "twice":
                model.zero_grad()
                made.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("around", ["all", "within"])
def test_within_checkpoints_and_around_them(*, reentrant: bool, around: str) -> None:
    model, _ = block()
    x = torch.randn(2, 5, 8, requires_grad=True)

    def loss() -> Tensor:
        middle = model.norm(model.first(x))  # noted before the checkpoint, met in it
        run: Any = (lambda: model(x)) if around == "all" else (lambda: model.proj(middle).sum(-1))
        if reentrant:
            run = (lambda x: model(x)) if around == "all" else (lambda middle: model.proj(middle).sum(-1))
        given = () if not reentrant else (x,) if around == "all" else (middle,)
        return checkpoint(run, *given, use_reentrant=reentrant).square().mean()

    assert same(model, loss)


def test_a_model_that_checkpoints_itself(sd: StableDiffusionPipeline) -> None:
    trained(sd.unet)
    sd.unet.train().enable_gradient_checkpointing()
    assert same(sd.unet, lambda: tiny.predict(sd.unet, torch.float32).square().mean())


def test_autocast_is_left_alone() -> None:
    model, plain = block()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain()

    assert kept(model, loss, on=True) == kept(model, loss, on=False)
    assert same(model, loss)


def test_compiled_it_is_left_alone(sd: StableDiffusionPipeline) -> None:
    model: UNet2DConditionModel = sd.unet
    trained(model)
    loss = torch.compile(lambda: tiny.predict(model, torch.float32).square().mean(), backend="eager")
    plain, again = gradients(model, loss, on=False), gradients(model, loss, on=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_stays_when_a_step_is_over_or_fails() -> None:
    """No cycles either: what was kept goes with the graph, without the garbage collector."""
    seen: list[weakref.ref[Tensor]] = []
    model, loss = block(lambda x: seen.append(weakref.ref(x)) or x)
    gradients(model, loss, on=True)
    assert seen.pop()() is None
    with pytest.raises(RuntimeError, match="cannot be multiplied"), Recompute():
        model(torch.randn(2, 5, 7))
    model.zero_grad()
    assert not vars(model.norm(torch.randn(2, 8)))
    with Recompute(), torch.no_grad():
        x = model.norm(torch.randn(2, 8))
    assert not vars(x)
