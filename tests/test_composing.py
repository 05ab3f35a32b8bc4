"""Switch and Composite against their definitions, run by hand; norm balancing against dense norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_diffusion import Adapter, AdapterStack
from lora_diffusion.composing import Composition, averaged, repeated, shares_of
from lora_diffusion.errors import ConfigError
from lora_diffusion.methods import METHODS
from lora_diffusion.stacked import balanced
from tests import tiny
from tests.test_gates import adapter

NAMES = ("a", "b", "c")
HOW: dict[str, Any] = {"guidance_scale": 4.0}


def three(pipe: Any, component: str = "unet") -> list[Adapter]:
    return [adapter(pipe, name, seed, components=(component,)) for seed, name in enumerate(NAMES)]


def stacked(pipe: Any, component: str = "unet") -> AdapterStack:
    stack = AdapterStack(pipe)
    for one, weight in zip(three(pipe, component), (0.8, -0.5, 1.0), strict=True):
        stack.add(one, weight)
    return stack


def test_switch_has_one_adapter_on_at_a_time(sd: Any) -> None:
    stack, peer = stacked(sd), tiny.sd()
    stack.compose("switch", every=2)
    ours = tiny.picture(sd, steps=7, **HOW)
    by_hand, step = stacked(peer), 0

    def take_turns(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        alone(index + 1)
        return given

    def alone(step: int) -> None:
        turn = NAMES[step // 2 % 3]  # a a b b c c a
        by_hand.weigh_all({n: w if n == turn else 0.0 for n, w in zip(NAMES, (0.8, -0.5, 1.0), strict=True)})

    alone(step)
    theirs = tiny.picture(peer, steps=7, callback_on_step_end=take_turns, **HOW)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.array_equal(ours, tiny.picture(sd, steps=7, **HOW))  # a second run starts with the first adapter
    stack.compose("sum")
    assert np.abs(ours - tiny.picture(sd, steps=7, **HOW)).max() > 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_composite_is_the_mean_of_guided_predictions(family: str) -> None:
    """The paper's sum, from each adapter's own conditional and unconditional prediction."""
    pipe = getattr(tiny, family)()
    component = "transformer" if family == "flux" else "unet"
    model, stack = getattr(pipe, component), stacked(pipe, component)
    weights = dict(stack.weights)
    given: list[tuple[Any, Any, Any]] = []
    heard = model.register_forward_hook(lambda m, a, k, out: given.append((a, k, out[0])), with_kwargs=True)
    tiny.picture(pipe, steps=1, **HOW)
    heard.remove()
    (args, kwargs, _) = given[0]
    with torch.no_grad():
        each = []
        for name in NAMES:
            stack.weigh_all({n: w if n == name else 0.0 for n, w in weights.items()})
            each.append(model(*args, **kwargs)[0])
        stack.weigh_all(weights)
        stack.compose("composite")
        ours = model(*args, **kwargs)[0]
    assert ours.shape == each[0].shape
    torch.testing.assert_close(ours, torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)
    if family != "flux":
        guided = [u + 4.0 * (c - u) for u, c in (one.chunk(2) for one in each)]
        (unconditional, conditional) = ours.chunk(2)
        mean = unconditional + 4.0 * (conditional - unconditional)
        torch.testing.assert_close(mean, torch.stack(guided).mean(0), atol=1e-4, rtol=1e-4)


def test_composite_of_one_is_that_one_and_weights_by_image_hold(sd: Any) -> None:
    a, b, _ = three(sd)
    prompts = ["a red fox", "a blue cat"]
    with AdapterStack(sd) as stack:
        stack.add(a, 0.8)
        stack.add(b, 0.0)
        alone = tiny.picture(sd, **HOW)
        stack.compose("composite")
        np.testing.assert_allclose(tiny.picture(sd, **HOW), alone, atol=1e-5)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        apart = []
        for i, mix in enumerate(((1.0, 0.3), (-0.5, 0.7))):
            stack.weigh_all({"a": mix[0], "b": mix[1]})
            apart.append(tiny.picture(sd, prompts[i], latents=noise[i : i + 1], **HOW))
        stack.weigh_all({"a": [1.0, -0.5], "b": [0.3, 0.7]})
        together = tiny.picture(sd, prompts, latents=noise, **HOW)
        np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-5)


@pytest.mark.parametrize("mode", ["switch", "composite"])
def test_an_image_goes_by_the_adapters_that_are_on_for_it(sd: Any, mode: str) -> None:
    """As `generate "… <lora:a>" "… <lora:b>"` has it: an adapter at 0 in an image takes no part there."""
    mixes = ({"a": 0.8, "b": 0.0, "c": 0.0}, {"a": 0.8, "b": "0@0,1@0.9", "c": 0.0}, {"a": 0.0, "b": 0.0, "c": 0.0})
    prompts, how = ["a red fox", "a blue cat", "a house"], {"steps": 5, **HOW}
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with stacked(sd) as stack:
        stack.compose(mode, every=2)
        apart = []
        for i, mix in enumerate(mixes):
            stack.weigh_all(mix)
            apart.append(tiny.picture(sd, prompts[i], latents=noise[i : i + 1], **how))
        stack.weigh_all({name: [mix[name] for mix in mixes] for name in mixes[0]})
        np.testing.assert_allclose(tiny.picture(sd, prompts, latents=noise, **how), np.concatenate(apart), atol=1e-5)
        with pytest.raises(ConfigError, match="3 weights by image"):
            tiny.picture(sd, prompts[:2], latents=noise[:2], **how)


def test_modes_leave_no_trace_and_bad_ones_are_refused(sd: Any) -> None:
    base, hooks = tiny.picture(sd), (len(sd.unet._forward_hooks), len(sd.unet._forward_pre_hooks))
    with stacked(sd) as stack:
        for mode in ("composite", "switch"):
            stack.compose(mode)
            tiny.picture(sd)
            with pytest.raises(ConfigError, match=mode):
                stack.fuse()
        with pytest.raises(ConfigError, match="did you mean 'switch'"):
            stack.compose("swich")
        for every in (0, 1.5, True):
            with pytest.raises(ConfigError, match="at least 1"):
                stack.compose("switch", every=every)  # type: ignore[arg-type]
        assert stack.composition.mode == "switch"
        assert "switch" in repr(stack)
    assert np.array_equal(tiny.picture(sd), base)
    assert (len(sd.unet._forward_hooks), len(sd.unet._forward_pre_hooks)) == hooks


def test_balanced_adapters_have_one_norm_in_each_layer(sd: Any) -> None:
    strong, weak = three(sd)[:2]
    for layer in strong.layers["unet"].values():
        layer.tensors["up"].mul_(20)
    factors: dict[str, list[float]] = {"a": [], "b": []}
    dense = tiny.sd()
    for name, live in ((n, dense.unet.get_submodule(n)) for n in strong.layers["unet"]):
        deltas = [METHODS["lora"].delta(one.layers["unet"][name], live) for one in (strong, weak)]
        norms = [float(delta.norm()) for delta in deltas]
        factors["a"].append((norms[0] * norms[1]) ** 0.5 / norms[0])
        for delta, norm, weight in zip(deltas, norms, (0.8, 0.5), strict=True):
            live.weight.data += weight * delta * (norms[0] * norms[1]) ** 0.5 / norm
    with AdapterStack(sd) as stack:
        stack.add(strong, 0.8)
        stack.compose(balance=True)
        stack.add(weak, 0.5)
        np.testing.assert_allclose(tiny.picture(sd), tiny.picture(dense), atol=1e-5)
        other = AdapterStack(fresh := tiny.sd())
        other.compose(balance=True)
        other.add(weak, 0.5)
        other.add(strong, 0.8)
        assert np.array_equal(tiny.picture(sd), tiny.picture(fresh))
    assert max(factors["a"]) < 0.5
    assert balanced([4.0, 1.0, 0.0]) == pytest.approx([0.5, 2.0, 1.0])
    assert balanced([3.0]) == pytest.approx([1.0])
    assert balanced([0.0]) == [1.0]


def test_inputs_are_repeated_and_outputs_averaged_as_blocks() -> None:
    x, ids = torch.arange(4.0).view(2, 2), torch.zeros(2, 3)
    given = repeated(
        {"x": x, "img_ids": ids, "t": torch.tensor(3), "more": (x, [x]), "shapes": [1, 2], "no": None}, 2, 2
    )
    assert torch.equal(given["x"], torch.cat([x, x]))
    assert given["img_ids"] is ids
    assert given["shapes"] == [1, 2, 1, 2]
    assert torch.equal(given["more"][1][0], torch.cat([x, x]))
    assert (given["t"].dim(), given["no"]) == (0, None)
    twice = (torch.cat([x, 3 * x]),)
    assert torch.equal(averaged(twice, torch.tensor([[0.5], [0.5]]))[0], 2 * x)
    assert torch.equal(averaged(twice, shares_of("ab", ["ab", "b"]))[0], torch.stack([2 * x[0], 3 * x[1]]))
    assert torch.equal(shares_of("ab", ["", "a"]), torch.tensor([[0.5, 1.0], [0.5, 0.0]]))


def test_turns() -> None:
    switch = Composition("switch", 2)
    assert [switch.turn(NAMES, step) for step in range(8)] == [*"aabbccaa"]
    assert switch.turn([], 3) is None
    assert Composition().turn(NAMES, 3) is None


def test_a_recipe_holds_the_mode(sd: Any, tmp_path: Path) -> None:
    from lora_diffusion.generating import Drawing, Order, draw_order, read_recipe, save_picture

    with stacked(sd) as stack:
        stack.compose("composite", every=3, balance=True)
        order = Order(["a fox"], [1], {name: [weight] for name, weight in stack.weights.items()})
        ((picture, said),) = draw_order(sd, stack, order, Drawing(1, size=(32, 32)), "base", None)
    save_picture(picture, tmp_path / "x.png", said)
    assert read_recipe(tmp_path / "x.png").composition == Composition("composite", 3, True)
