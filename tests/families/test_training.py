"""Every family against its own Diffusers pipeline: what the denoiser is asked and answers, latents, adapters.

The pipeline draws; its calls of `scheduler.step` are the peer that `predict`, `encode_prompts` and the objective
have to agree with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from lora_diffusion import AdapterStack, TrainConfig, load_adapter, train
from lora_diffusion.families import FAMILIES, family_of
from lora_diffusion.families.encoding import pack, unpack
from lora_diffusion.training.objective import Flow, losses, objective_for
from tests import tiny, tiny_families
from tests.tiny_families import drawn
from tests.training.pictures import pack as picture_pack

#: family (and variant) -> tiny pipeline
PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny.sd,
    "sd (v prediction)": tiny_families.sd2_v,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "sd3 (3.5 medium)": tiny_families.sd35,
    "flux": tiny.flux,
    "flux (schnell)": tiny_families.schnell,
    "flux2": tiny_families.flux2,
    "z-image": tiny_families.z_image,
    "qwen-image": tiny_families.qwen_image,
    "chroma": tiny_families.chroma,
    "lumina2": tiny_families.lumina2,
    "sana": tiny_families.sana,
    "pixart-sigma": tiny_families.pixart,
}
PACKED = ("flux", "chroma", "qwen-image")
WITHOUT_LOADER = ("pixart-sigma",)  # Diffusers loads no adapters there
every_family = pytest.mark.parametrize("name", PIPELINES)
PROMPT = "a red fox"


def spied(pipe: Any, change: Callable[[Tensor], Tensor] = lambda x: x) -> list[tuple[Tensor, float, Tensor]]:
    """The (answer, timestep, what the denoiser saw) of each step to come; `change` is done to what a step returns."""
    steps: list[tuple[Tensor, float, Tensor]] = []
    step, scale = pipe.scheduler.step, getattr(pipe.scheduler, "scale_model_input", lambda sample, t: sample)

    def spy(answer: Tensor, t: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append((answer, float(t), scale(sample, t)))
        result = step(answer, t, sample, *args, **kwargs)
        return (change(result[0]),)

    pipe.scheduler.step = spy
    return steps


def family_name(name: str) -> str:
    return name.split(" ")[0]


def packed(name: str, latents: Tensor) -> Tensor:
    """Latents as the pipeline's scheduler sees them."""
    if family_name(name) in PACKED:
        return pack(latents)
    return latents.flatten(2).transpose(1, 2) if name == "flux2" else latents


def unpacked(name: str, tokens: Tensor) -> Tensor:
    if family_name(name) in PACKED:
        return unpack(tokens, tiny.LATENT, tiny.LATENT)
    half = tiny.LATENT // 2
    return tokens.transpose(1, 2).unflatten(2, (half, half)) if name == "flux2" else tokens


def times_of(family: Any, t: float) -> Tensor:
    return torch.tensor([t / 1000 if family.process == "flow" else t])


def test_every_registered_family_is_tested_here_and_knows_its_pipelines() -> None:
    for name, build in PIPELINES.items():
        pipe = build()
        assert family_of(pipe).name == family_name(name)
        assert [family.name for family in FAMILIES.values() if family.matches(pipe)] == [family_of(pipe).name]
    assert {family_name(name) for name in PIPELINES} == set(FAMILIES)


@every_family
@torch.no_grad()
def test_predict_is_what_the_pipeline_gives_its_scheduler(name: str) -> None:
    """So prompts, masks, timestep scale, sign, guidance, positions and packing are the pipeline's own."""
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    conditioning = family.encode_prompts(pipe, [PROMPT, "a much longer prompt about a hen", ""])
    assert {len(values) for values in conditioning.values()} == {3}
    if family.sized:
        conditioning["time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(3, -1)
    steps = spied(pipe)
    own_length = {"max_sequence_length": 64} if family_name(name) == "flux" else {}  # its tokenizer's
    drawn(pipe, PROMPT, **own_length)
    assert len(steps) == 2
    for answer, t, seen in steps:
        alone = {key: values[:1] for key, values in conditioning.items()}
        latents = unpacked(name, seen)
        ours = family.predict(getattr(pipe, family.denoiser), latents, times_of(family, t), alone)
        torch.testing.assert_close(packed(name, ours), answer.float(), atol=2e-5, rtol=1e-4)
        times = times_of(family, t).expand(3)
        batch = family.predict(getattr(pipe, family.denoiser), latents.expand(3, -1, -1, -1), times, conditioning)
        torch.testing.assert_close(packed(name, batch[:1]), answer.float(), atol=2e-5, rtol=1e-4)
        assert not torch.allclose(batch[0], batch[1])


@every_family
@torch.no_grad()
def test_latents_are_what_the_pipeline_decodes(name: str) -> None:
    """Scale, shift, means and deviations, packing: the pipeline turns our latents into the VAE's own round trip."""
    pipe = PIPELINES[name]()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = family_of(pipe).encode_pictures(pipe, x)
    spied(pipe, lambda result: packed(name, latents).to(result.dtype))
    video = name == "qwen-image"
    encoded = pipe.vae.encode(x[:, :, None] if video else x)
    mode = encoded.latent if name == "sana" else encoded.latent_dist.mode()
    trip = pipe.vae.decode(mode).sample
    wanted = pipe.image_processor.postprocess(trip[:, :, 0] if video else trip, output_type="np")
    np.testing.assert_allclose(drawn(pipe, PROMPT), wanted, atol=2e-5)


@every_family
@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_a_true_answer_is_no_loss_and_the_scheduler_s_last_step_takes_it_back_to_the_picture(
    name: str, steps: int
) -> None:
    """In one step from all noise or nearly so, and in the last of three."""
    pipe = PIPELINES[name]()
    family, scheduler = family_of(pipe), pipe.scheduler
    drawn(pipe, PROMPT, steps=steps)  # sets timesteps and shift as the pipeline does
    t = scheduler.timesteps[-1]
    half = tiny.LATENT // 2
    shape = (1, 16, half, half) if name == "flux2" else (1, 4, tiny.LATENT, tiny.LATENT)
    latents, noise = torch.randn(shape), torch.randn(shape)
    objective, times = objective_for(family, scheduler), times_of(family, float(t))
    if family.process == "diffusion":
        times = times.long()
    noisy, target = objective.noised(latents, noise, times)

    class Oracle:
        """The family with a denoiser that knows."""

        predict = staticmethod(lambda *_: target)

    assert losses(Oracle(), objective, pipe.vae, latents, {}, noise, times).item() == 0  # type: ignore[arg-type]
    sigma = scheduler.sigmas[-2] if type(scheduler).__name__ == "EulerDiscreteScheduler" else torch.tensor(0.0)
    if name == "sd (v prediction)" or name == "sd":
        assert objective.target == ("epsilon" if name == "sd" else "v_prediction")  # type: ignore[attr-defined]
    scheduler._step_index, scheduler._begin_index = None, None
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0
    result = scheduler.step(target, t, noisy * (sigma**2 + 1).sqrt()).prev_sample
    torch.testing.assert_close(result, latents, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("name", "shift"), [("sd3", 3.0), ("z-image", 3.0), ("lumina2", 6.0), ("sana", 3.0)])
def test_a_flow_is_shifted_as_the_family_s_scheduler_says(name: str, shift: float) -> None:
    pipe = PIPELINES[name]()
    assert objective_for(family_of(pipe), pipe.scheduler) == Flow(shift)


@pytest.mark.parametrize("name", ["sdxl", "lumina2", "sana"])
@torch.no_grad()
def test_no_prompt_is_encoded_as_guidance_encodes_it(name: str) -> None:
    pipe = PIPELINES[name]()
    ours = family_of(pipe).encode_prompts(pipe, ["", PROMPT])
    if name == "sdxl":
        assert not ours["states"][0].any()
        assert not ours["pooled"][0].any()
    else:
        _, _, states, mask = pipe.encode_prompt([PROMPT], device=torch.device("cpu"))
        torch.testing.assert_close(ours["states"][:1] * mask[..., None], states * mask[..., None])
        assert torch.equal(ours["mask"][:1].long(), mask)
    assert ours["states"][1].any()


@every_family
def test_trained_over_nf4_it_loads_in_diffusers_and_changes_the_picture(name: str, tmp_path: Path) -> None:
    PIPELINES[name]().save_pretrained(tmp_path / "base")
    result = train(_config(tmp_path))
    assert result.adapter is not None
    assert result.backbone_unchanged
    assert result.report is not None
    assert any(layer.stored == "nf4" for layer in result.report.layers)
    assert np.isfinite([*result.losses, result.heldout_base, result.heldout_adapter]).all()
    pipe, peer = (DiffusionPipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    plain = drawn(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(result.adapter)
        ours = drawn(pipe)
    assert np.abs(ours - plain).max() > 1e-3
    if name not in WITHOUT_LOADER:
        peer.load_lora_weights(result.adapter)
        np.testing.assert_allclose(ours, drawn(peer), atol=2e-5)


def test_a_format_of_other_tools_has_the_layer_names_that_they_know(tmp_path: Path) -> None:
    tiny.sdxl().save_pretrained(tmp_path / "base")
    result = train(_config(tmp_path, format="kohya"))
    assert result.adapter is not None
    pipe, peer = (DiffusionPipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    adapter = load_adapter(result.adapter)
    assert all(name.startswith(("input_blocks", "middle_block", "output_blocks")) for _, name, _ in adapter)
    AdapterStack(pipe).add(adapter)
    peer.load_lora_weights(result.adapter)
    np.testing.assert_allclose(drawn(pipe), drawn(peer), atol=2e-5)


def test_a_method_that_the_checkpoints_names_cannot_say_keeps_diffusers_names(tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path / "base")
    result = train(_config(tmp_path, method="lokr"))
    assert result.adapter is not None
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    AdapterStack(pipe).add(result.adapter)
    assert any("transformer_blocks_0_attn_to_q" in name for _, name, _ in load_adapter(result.adapter))


def _config(root: Path, **adapter: str) -> TrainConfig:
    return TrainConfig.parse(
        {
            "name": "blocks",
            "base": str(root / "base"),
            "output": str(root / "out"),
            "data": {"folder": str(picture_pack(root / "pack", 3)), "heldout": 0.34, "resolution": 32},
            "adapter": {"rank": 4, "targets": "attention+ff"} | adapter,
            "backbone": {"device": "cpu"},
            "train": {"steps": 3, "batch": 2, "lr": 3e-2, "warmup": 0, "checkpoint_every": 3},
        }
    )
