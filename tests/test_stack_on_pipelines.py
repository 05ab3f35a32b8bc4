"""The stack on image-to-image, inpainting and ControlNet pipelines, and under the hooks of model offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)

from lora_diffusion import AdapterStack
from lora_diffusion.errors import TargetError
from tests import tiny
from tests.test_gates import adapter

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 1, 32, 32).index_fill_(3, torch.arange(16), 1.0)


def image_to_image() -> tuple[Any, dict[str, Any]]:
    return StableDiffusionImg2ImgPipeline(**tiny.sd().components), {"image": IMAGE, "strength": 0.5, "steps": 4}


def inpainting() -> tuple[Any, dict[str, Any]]:
    how = {"image": IMAGE, "mask_image": MASK, "strength": 1.0}
    return StableDiffusionInpaintPipeline(**tiny.sd().components), how


def controlled() -> tuple[Any, dict[str, Any]]:
    pipe = tiny.sd()
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))  # halves, as the VAE does
    for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(zero.weight, std=0.1)
    net.controlnet_cond_embedding.conv_out.weight.data.normal_()
    return StableDiffusionControlNetPipeline(**pipe.components, controlnet=net.eval()), {"image": IMAGE}


def drawn(pipe: Any, how: dict[str, Any]) -> np.ndarray:
    how = dict(how)
    sized = {} if isinstance(pipe, StableDiffusionImg2ImgPipeline) else {"height": 32, "width": 32}
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": how.pop("steps", 2), "guidance_scale": 3.0, "output_type": "np"}
    return pipe("a red fox", generator=torch.Generator().manual_seed(7), **sized, **settings, **how).images


@pytest.mark.parametrize("make", [image_to_image, inpainting, controlled])
def test_a_stack_is_what_fusing_says_and_leaves_no_trace(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    pipe, how = make()
    base, (a, b) = drawn(pipe, how), (adapter(pipe, "a", 1), adapter(pipe, "b", 2))
    with AdapterStack(pipe) as stack:
        stack.add(a, 0.8)
        stack.add(b, -0.4)
        ours = drawn(pipe, how)
        stack.fuse()
        np.testing.assert_allclose(ours, drawn(pipe, how), atol=1e-5)
        stack.unfuse()
        stack.compose("composite")
        assert np.abs(drawn(pipe, how) - ours).max() > 1e-4
    assert np.abs(ours - base).max() > 1e-3
    assert np.array_equal(drawn(pipe, how), base)


def test_a_schedule_counts_the_steps_that_image_to_image_takes() -> None:
    pipe, how = image_to_image()
    seen: list[float] = []

    def weight(progress: float) -> float:
        seen.append(progress)
        return progress

    with AdapterStack(pipe) as stack:
        stack.add(adapter(pipe, components=("unet",)), weight)
        seen.clear()
        drawn(pipe, {**how, "strength": 0.75})
    assert sorted(set(seen)) == [0.0, 0.5, 1.0]  # three of four steps


@pytest.mark.parametrize("first", ["stack", "offload"])
def test_under_the_hooks_of_model_offloading(first: str) -> None:
    """What `enable_model_cpu_offload` installs; it refuses to run without a GPU, its hooks do not."""
    from accelerate import cpu_offload_with_hook

    pipe, plain = tiny.sd(), tiny.sd()
    one, other = adapter(pipe, "a", 1), adapter(pipe, "b", 2)
    with AdapterStack(plain) as stack:
        stack.add(one, "0@0,1@1")
        stack.add(other, 0.5)
        expected = tiny.picture(plain)
    base = tiny.picture(plain)
    stack = AdapterStack(pipe)
    if first == "stack":
        stack.add(one, "0@0,1@1")
    hooks = [cpu_offload_with_hook(getattr(pipe, n), torch.device("cpu"))[1] for n in ("text_encoder", "unet", "vae")]
    if first == "offload":
        stack.add(one, "0@0,1@1")
    stack.add(other, 0.5)
    np.testing.assert_allclose(tiny.picture(pipe), expected, atol=1e-5)
    for hook in hooks:
        hook.offload()
    stack.clear()
    np.testing.assert_allclose(tiny.picture(pipe), base, atol=1e-6)


@pytest.mark.parametrize("make", [tiny.sd, tiny.flux])
def test_fused_projections_are_refused_and_not_passed_by(make: Callable[[], Any]) -> None:
    pipe = make()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    one = adapter(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(one)
        expected = tiny.picture(pipe)
    denoiser.fuse_qkv_projections()
    with AdapterStack(pipe) as stack:
        with pytest.raises(TargetError, match=r"fused; call unfuse_qkv_projections\(\) first"):
            stack.add(one)
        assert not len(stack)
        denoiser.unfuse_qkv_projections()
        stack.add(one)
        assert np.array_equal(tiny.picture(pipe), expected)
