"""Weights by block, step, image and place: each equals the plain runs it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_diffusion import Adapter, AdapterStack
from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.gates import (
    Call,
    Keyframes,
    Region,
    Window,
    linear,
    parse_schedule,
    parse_weight,
    resolve_weight,
    spell_weight,
)
from lora_diffusion.gates.blocks import blocks_of, layers_of
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.products import add_linear
from lora_diffusion.targets import find_targets
from tests import tiny

HALF = np.zeros((32, 32), dtype=np.float32)
HALF[:, :16] = 1


def adapter(pipe: Any, name: str = "a", seed: int = 1, components: Sequence[str] = ()) -> Adapter:
    """Random rank-2 pairs on every linear layer of the denoiser and the attention of the text encoder."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    layers = {}
    for component, targets in ((denoiser, "all-linear"), ("text_encoder", "attention")):
        if components and component not in components:
            continue
        found = find_targets(getattr(pipe, component), targets)
        layers[component] = {n: LoRA(2).fresh(layer, generator) for n, layer in found.items()}
        for new in layers[component].values():
            new.tensors["up"].normal_(generator=generator).mul_(0.1)
    return Adapter(name, layers)


def drawn(pipe: Any, weight: Any, *adapters: Adapter, **kwargs: Any) -> np.ndarray:
    with AdapterStack(pipe) as stack:
        for number, one in enumerate(adapters or (adapter(pipe),)):
            stack.add(one, weight[number] if adapters else weight)
        return tiny.picture(pipe, **kwargs)


def test_names_of_blocks() -> None:
    assert blocks_of("down_blocks.1.attentions.0.proj_in") == ("down", "down.1")
    assert blocks_of("mid_block.resnets.0.conv1") == ("mid",)
    assert blocks_of("transformer_blocks.12.attn.to_q") == ("blocks", "double", "blocks.12", "double.12")
    assert blocks_of("single_transformer_blocks.3.proj_mlp") == ("single", "single.3")
    assert blocks_of("text_model.encoder.layers.3.mlp.fc1") == ("blocks", "blocks.3")
    layers = [f"blocks.{i}.ffn.0" for i in range(12)]
    assert layers_of("blocks.0-9", layers) == layers[:10]
    assert layers_of("blocks.1", layers) == [layers[1]]
    assert layers_of("blocks.1*", layers) == [layers[1], *layers[10:]]


def test_the_narrowest_name_wins_and_what_is_not_named_is_off() -> None:
    layers = {"unet": ["down_blocks.0.a", "down_blocks.1.a", "mid_block.a"], "text_encoder": ["layers.0.q"]}
    levels = resolve_weight({"down.1": 3, "unet": 1, "down": 2, "text_encoder": {"blocks.0": 0.5}}, layers, "x")
    assert [levels.at("unet", name) for name in layers["unet"]] == [2, 3, 1]
    assert levels.at("text_encoder", "layers.0.q") == 0.5
    assert resolve_weight({"te": 1}, layers, "x").at("unet", "mid_block.a") == 0
    with pytest.raises(TargetError, match=r"did you mean 'down', 'down.1'"):
        resolve_weight({"donw": 1}, layers, "x")
    with pytest.raises(TargetError, match=r"unet\.up"):
        resolve_weight({"unet.up": 1}, layers, "x")


def test_a_block_weight_is_the_adapter_cut_to_the_block(sd: DiffusionPipeline) -> None:
    whole = adapter(sd)
    cut = {n: layer for n, layer in whole.layers["unet"].items() if n.startswith("up_blocks.0.")}
    assert 0 < len(cut) < len(whole.layers["unet"])
    expected = drawn(sd, [0.8], Adapter("cut", {"unet": cut}))
    assert np.array_equal(drawn(sd, {"up.0": 0.8}), expected)
    assert np.array_equal(drawn(sd, {"unet": {"up_blocks.0.*": 0.8}}), expected)


def test_keyframes_windows_and_their_spelling() -> None:
    ramp = parse_schedule("0@0,1@0.5")
    assert [ramp(p) for p in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 1]
    window = parse_schedule("0.8@0.2-0.6")
    assert [window(p) for p in (0.1, 0.2, 0.6, 0.7)] == [0, 0.8, 0.8, 0]
    assert parse_weight("te=0.5:unet=0@0,1@0.5") == {"te": 0.5, "unet": "0@0,1@0.5"}
    for bad in ("1@2", "x@1", "1@0.5,2@0.5", "0.8@0.6-0.2", "nan", "te=:unet=1"):
        with pytest.raises(ConfigError):
            parse_weight(bad)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-4, 4)), min_size=1, max_size=5, unique_by=lambda p: p[0]))
def test_a_written_schedule_reads_back_the_same(points: list[tuple[float, float]]) -> None:
    keyframes = Keyframes(tuple(sorted(points)))
    assert parse_schedule(spell_weight(keyframes)) == keyframes
    assert parse_schedule(spell_weight(Window(0.5, 0.25, 1.0))) == Window(0.5, 0.25, 1.0)


def by_hand(pipe: Any, ramp: Any, steps: int, **kwargs: Any) -> np.ndarray:
    """`ramp` turned by hand between the steps."""
    with AdapterStack(pipe) as stack:
        name = stack.add(adapter(pipe, components=("unet", "transformer")), ramp(0.0))

        def turn(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            stack.weigh(name, ramp(min(1.0, (step + 1) / (steps - 1))))
            return values

        return tiny.picture(pipe, steps=steps, callback_on_step_end=turn, **kwargs)


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler])
def test_a_schedule_equals_weighing_by_hand_before_each_step(sd: Any, scheduler: Any) -> None:
    if scheduler is not None:
        sd.scheduler = scheduler.from_config(sd.scheduler.config)
    ramp = linear(0.2, 1.0)
    with AdapterStack(sd) as stack:
        stack.add(adapter(sd, components=("unet",)), ramp)
        ours = tiny.picture(sd, steps=4)
        assert sd.unet._forward_pre_hooks
    assert not sd.unet._forward_pre_hooks
    assert np.array_equal(ours, by_hand(sd, ramp, 4))


def test_a_schedule_on_a_flow_transformer(flux: Any) -> None:
    ramp = parse_schedule("1@0,0@0.5")
    with AdapterStack(flux) as stack:
        stack.add(adapter(flux, components=("transformer",)), "1@0,0@0.5")
        ours = tiny.picture(flux, steps=3)
    assert np.array_equal(ours, by_hand(flux, ramp, 3))


def heard(pipe: Any, **kwargs: Any) -> list[float]:
    """The progress at each denoiser call."""
    progress: list[float] = []
    with AdapterStack(pipe) as stack:
        stack.add(adapter(pipe, components=("unet",)), lambda p: progress.append(p) or 0.0)
        progress.clear()
        pipe(prompt="x", output_type="latent", **kwargs)
    layers = len(adapter(pipe, components=("unet",)).layers["unet"])
    return progress[::layers]


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_calls_at_one_timestep_are_at_one_progress(sd: Any, scheduler: Any) -> None:
    sd.set_progress_bar_config(disable=True)
    sd.scheduler = scheduler.from_config(sd.scheduler.config, skip_prk_steps=True)
    progress = heard(sd, num_inference_steps=3, height=32, width=32)
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == (0.0, 1.0)
    assert len(progress) > len(set(progress)) == 3


def test_a_shortened_run_counts_from_where_it_starts(sd: Any) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (32, 32), "red")
    assert heard(pipe, image=picture, strength=0.5, num_inference_steps=6) == [0.0, 0.5, 1.0]


def test_each_image_of_a_batch_has_its_own_mix(sd: Any) -> None:
    two = [adapter(sd, "a", 1), adapter(sd, "b", 2)]
    mixes = [(0.8, -0.3), (0.0, 1.0), (0.5, 0.0)]

    def run(weights: Sequence[Any], seeds: Sequence[int]) -> np.ndarray:
        with AdapterStack(sd) as stack:
            for one, weight in zip(two, weights, strict=True):
                stack.add(one, weight)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            prompts = ["a fox"] * len(seeds)
            sizes = {"height": 32, "width": 32, "num_inference_steps": 2}
            return sd(prompts, generator=generators, output_type="np", guidance_scale=5.0, **sizes).images

    together = run([list(column) for column in zip(*mixes, strict=True)], range(3))
    alone = [run(mix, [seed])[0] for seed, mix in enumerate(mixes)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together[0] - run(mixes[1], [0])[0]).max() > 1e-3
    with pytest.raises(ConfigError, match="2 weights by image"):
        run([[1.0, 0.0], 0.0], range(3))


@pytest.mark.parametrize("acting", [1, 2, 8])
def test_images_that_meet_their_own_rows_alone_get_the_same_sum(acting: int) -> None:
    random = torch.Generator().manual_seed(acting)
    x, out = (torch.randn(3, 5, width, generator=random) for width in (6, 7))
    down, up = (torch.randn(8, width, generator=random) for width in (6, 7))
    gate = torch.zeros(3, 1, 8)
    for image in range(3):
        gate[image, 0, torch.randperm(8, generator=random)[: max(1, acting - image)]] = 1.5
    expected = out + ((x @ down.t()) * gate) @ up
    torch.testing.assert_close(add_linear(x, out.clone(), down, up, gate), expected)
    shown = out.transpose(1, 2).contiguous().transpose(1, 2)  # cannot be added to in place
    torch.testing.assert_close(add_linear(x, shown, down, up, gate), expected)
    assert torch.equal(add_linear(x, out.clone(), down, up, torch.zeros(3, 1, 8)), out)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3, tiny.flux])
def test_full_masks_are_none_empty_masks_the_base_and_disjoint_ones_commute(build: Any) -> None:
    pipe = build()
    a, b = adapter(pipe, "a", 1), adapter(pipe, "b", 2)
    assert np.array_equal(drawn(pipe, [Region(np.ones((8, 8)), 0.8)], a), drawn(pipe, [0.8], a))
    base = tiny.picture(pipe)
    assert np.array_equal(drawn(pipe, [Region(np.zeros((8, 8)), 0.8)], a), base)
    left, right = Region(HALF), Region(1 - HALF)
    both = drawn(pipe, [left, right], a, b)
    assert np.array_equal(both, drawn(pipe, [right, left], b, a))
    for other in (base, drawn(pipe, [1.0], a), drawn(pipe, [right, left], a, b)):
        assert np.abs(both - other).max() > 1e-3


def test_a_region_may_say_what_it_is_by_part(sd: Any) -> None:
    one = adapter(sd, "a", 1)
    by_part = drawn(sd, [Region(HALF, {"unet": 0.8, "down.0": "0@0,1@1"})], one)
    assert np.array_equal(by_part, drawn(sd, [{"unet": Region(HALF, 0.8), "down.0": Region(HALF, "0@0,1@1")}], one))
    assert not np.array_equal(by_part, drawn(sd, [{"unet": 0.8, "down.0": "0@0,1@1"}], one))
    with pytest.raises(TargetError, match="did you mean"):
        drawn(sd, [Region(HALF, {"unett": 0.8})], one)


def test_a_mask_acts_inside_it_alone(sd: Any) -> None:
    layers = adapter(sd, components=("unet",)).layers["unet"]
    name = next(n for n in layers if n.endswith("attn1.to_out.0"))
    outs: list[torch.Tensor] = []
    for weight in (0.0, 1.0, Region(HALF, 1.0)):
        with AdapterStack(sd) as stack:
            stack.add(Adapter("a", {"unet": {name: layers[name]}}), weight)
            hook = sd.unet.get_submodule(name).register_forward_hook(lambda m, a, out: outs.append(out.clone()))
            tiny.picture(sd, steps=1)
            hook.remove()
    base, full, half = outs
    side = int(base.shape[1] ** 0.5)
    inside = (torch.arange(base.shape[1]) % side) < side // 2
    torch.testing.assert_close(half[:, inside], full[:, inside])
    assert torch.equal(half[:, ~inside], base[:, ~inside])
    assert not torch.equal(full[:, inside], base[:, inside])


def test_masks_from_pictures_files_and_arrays_are_the_same(tmp_path: Path) -> None:
    picture = Image.fromarray((HALF * 255).astype(np.uint8))
    picture.save(tmp_path / "mask.png")
    for mask in (picture, tmp_path / "mask.png", torch.tensor(HALF), HALF[None]):
        assert np.array_equal(Region(mask).pixels.numpy(), HALF)
    for bad in (HALF * 2, HALF[0], tmp_path / "none.png", np.full((2, 2), np.nan)):
        with pytest.raises(ConfigError, match="mask"):
            Region(bad)


def test_joint_tokens_are_text_then_picture() -> None:
    region, call = Region(HALF), Call(grid=(4, 4), text=5)
    whole = call.tokens(region, "single_transformer_blocks.0.proj_mlp", (21,))
    assert whole.tolist() == [0.5] * 5 + [1, 1, 0, 0] * 4
    assert call.tokens(region, "transformer_blocks.0.attn.to_q", (16,)).tolist() == [1, 1, 0, 0] * 4
    assert call.tokens(region, "transformer_blocks.0.attn.add_q_proj", (16,)).tolist() == [0.5]
    assert call.tokens(region, "down_blocks.1.attentions.0.proj_in", (4,)).tolist() == [1, 0, 1, 0]
