"""The stack on real pipelines: the north star, all or nothing, off without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from lora_diffusion import Adapter, AdapterMismatchError, AdapterStack, LoRA, TargetError, save_adapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.methods import METHODS
from lora_diffusion.quantize import fingerprint, quantize
from lora_diffusion.targets import find_targets
from tests import tiny

WEIGHTS = {"a": 0.8, "training": 0.5, "c.v1": -0.3}
Make = Callable[..., Adapter]


def random_adapter(pipe: DiffusionPipeline, name: str, rank: int, alpha: float, targets: str, seed: int) -> Adapter:
    """Random pairs on the U-Net's targets and the text encoder's attention."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for component, where in (("unet", targets), ("text_encoder", "attention")):
        model = getattr(pipe, component)
        fresh = {n: LoRA(rank, alpha).fresh(layer, generator) for n, layer in find_targets(model, where).items()}
        for new in fresh.values():
            new.tensors["up"].normal_(generator=generator).mul_(0.1)
        layers[component] = fresh
    return Adapter(name, layers)


def three(pipe: DiffusionPipeline) -> list[Adapter]:
    """Different ranks, alphas and targets; two names that PEFT cannot have."""
    return [
        random_adapter(pipe, "a", 4, 2.0, "attention+ff+conv", 1),
        random_adapter(pipe, "training", 8, 8.0, "attention", 2),
        random_adapter(pipe, "c.v1", 2, 3.0, "all-linear", 3),
    ]


def state(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Module trees and every byte of the denoiser and text encoder."""
    parts = (pipe.unet, pipe.text_encoder)
    return (*(str(part) for part in parts), *(fingerprint(part) for part in parts))


def with_stack(pipe: DiffusionPipeline, adapters: list[Adapter]) -> np.ndarray:
    with AdapterStack(pipe) as stack:
        for adapter in adapters:
            stack.add(adapter, WEIGHTS[adapter.name])
        return tiny.picture(pipe)


def test_three_adapters_equal_set_adapters_and_the_dense_sum(sd: DiffusionPipeline, tmp_path: Path) -> None:
    adapters = three(sd)
    ours = with_stack(sd, adapters)

    peer = tiny.sd()
    names = ["x0", "x1", "x2"]  # PEFT takes neither dots nor "training"
    for name, adapter in zip(names, adapters, strict=True):
        peer.load_lora_weights(save_adapter(adapter, tmp_path / f"{name}.safetensors"), adapter_name=name)
    peer.set_adapters(names, list(WEIGHTS.values()))
    np.testing.assert_allclose(ours, tiny.picture(peer), atol=1e-5)

    merged = tiny.sd()
    for adapter in adapters:
        for component, name, layer in adapter:
            live = getattr(merged, component).get_submodule(name)
            live.weight.data += WEIGHTS[adapter.name] * METHODS["lora"].delta(layer, live)
    np.testing.assert_allclose(ours, tiny.picture(merged), atol=1e-5)
    assert np.abs(ours - tiny.picture(tiny.sd())).max() > 0.01


def test_off_again_bit_for_bit(sd: DiffusionPipeline) -> None:
    before, picture = state(sd), tiny.picture(sd)
    with_stack(sd, three(sd))
    assert state(sd) == before
    assert np.array_equal(tiny.picture(sd), picture)


def test_order_of_adding_does_not_matter(sd: DiffusionPipeline) -> None:
    adapters = three(sd)
    assert np.array_equal(with_stack(sd, adapters), with_stack(sd, adapters[::-1]))


def test_removing_one_leaves_the_others_as_if_it_never_came(sd: DiffusionPipeline) -> None:
    a, b, c = three(sd)
    expected = with_stack(sd, [a, c])
    with AdapterStack(sd) as stack:
        for adapter in (a, b, c):
            stack.add(adapter, WEIGHTS[adapter.name])
        stack.remove(b.name)
        assert list(stack) == [a.name, c.name]
        assert np.array_equal(tiny.picture(sd), expected)


def test_weight_zero_is_the_base(sd: DiffusionPipeline) -> None:
    picture = tiny.picture(sd)
    with AdapterStack(sd) as stack:
        for adapter in three(sd):
            stack.add(adapter, 0.0)
        assert np.array_equal(tiny.picture(sd), picture)


def test_weights_by_component(sd: DiffusionPipeline) -> None:
    adapter = three(sd)[0]
    unet_only = Adapter("u", {"unet": adapter.layers["unet"]})
    with AdapterStack(sd) as stack:
        stack.add(adapter, {"denoiser": 0.8})
        split = tiny.picture(sd)
    with AdapterStack(sd) as stack:
        stack.add(unet_only, 0.8)
        assert np.array_equal(tiny.picture(sd), split)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_stacks_on_a_quantised_backbone(sd: DiffusionPipeline, precision: str) -> None:
    quantize(sd.unet, precision, compute_dtype=torch.float32)
    before, picture = state(sd), tiny.picture(sd)
    assert np.abs(with_stack(sd, three(sd)) - picture).max() > 0.01
    assert state(sd) == before
    assert np.array_equal(tiny.picture(sd), picture)


def broken(adapter: Adapter, fault: str) -> Adapter:
    """The adapter with one thing wrong in its last layer."""
    *_, name = adapter.layers["text_encoder"]
    layer = adapter.layers["text_encoder"][name]
    tensors = dict(layer.tensors)
    if fault == "shape":
        tensors["up"] = tensors["up"][:-1]
    elif fault == "half":
        del tensors["down"]
    elif fault == "nan":
        tensors["up"] = tensors["up"].clone().fill_(float("nan"))
    layers = {c: dict(of) for c, of in adapter.layers.items()}
    layers["text_encoder"][name if fault != "name" else "encoder.layers.99.self_attn.q_proj"] = type(layer)(
        layer.method, tensors, float("inf") if fault == "alpha" else layer.alpha
    )
    return Adapter("broken", layers)


@pytest.mark.parametrize("fault", ["shape", "half", "nan", "alpha", "name"])
def test_a_failed_add_changes_nothing(sd: DiffusionPipeline, fault: str) -> None:
    good, other, _ = three(sd)
    with AdapterStack(sd) as stack:
        stack.add(good, 0.8)
        before, picture = (str(sd.unet), str(sd.text_encoder)), tiny.picture(sd)
        with pytest.raises(ValueError, match="broken"):
            stack.add(broken(other, fault))
        assert list(stack) == ["a"]
        assert (str(sd.unet), str(sd.text_encoder)) == before
        assert np.array_equal(tiny.picture(sd), picture)


def test_another_family_is_refused_with_names(sd: DiffusionPipeline, flux: DiffusionPipeline) -> None:
    layers = {n: LoRA(2).fresh(layer) for n, layer in find_targets(flux.transformer, "attention").items()}
    with pytest.raises(AdapterMismatchError, match="find no place") as caught:
        AdapterStack(sd).add(Adapter("flux style", {"transformer": layers}))
    assert "UNet2DConditionModel" in str(caught.value)


def test_bad_weights_and_names_are_refused(sd: DiffusionPipeline) -> None:
    a, *_ = three(sd)
    with AdapterStack(sd) as stack:
        for weight in (float("nan"), float("inf"), "0.8", True):
            with pytest.raises(ConfigError, match="finite number"):
                stack.add(a, weight)  # type: ignore[arg-type]
        with pytest.raises(TargetError, match="did you mean 'text_encoder'"):
            stack.add(a, {"text_encodr": 1.0})
        stack.add(a)
        with pytest.raises(TargetError, match="on already"):
            stack.add(a)
        with pytest.raises(TargetError, match="no adapter 'b'"):
            stack.weigh("b", 1.0)
        assert "'a' at 1.0" in repr(stack)


def test_stack_works_under_offload_hooks_in_either_order(sd: DiffusionPipeline) -> None:
    from accelerate import cpu_offload

    adapters = three(sd)
    expected = with_stack(sd, adapters)
    for first in ("stack", "offload"):
        pipe = tiny.sd()
        stack = AdapterStack(pipe)
        if first == "offload":
            cpu_offload(pipe.unet, torch.device("cpu"))
        for adapter in adapters:
            stack.add(adapter, WEIGHTS[adapter.name])
        if first == "stack":
            cpu_offload(pipe.unet, torch.device("cpu"))
        np.testing.assert_allclose(tiny.picture(pipe), expected, atol=1e-5)
