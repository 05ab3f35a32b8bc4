"""The three plugins against their peers: PEFT's FourierFT, Diffusers' AuraFlow, and a run that uses all of them.

    pip install --no-deps samples/plugin && python -m pytest samples/plugin/tests        # from a checkout's root

That the method and the format keep what every method and format promises, the suite's own contract tests show once
the package is installed: `python -m pytest tests/methods/test_contract.py -k fourierft`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from peft import FourierFTConfig, get_peft_model
from torch import nn

from lora_diffusion import Adapter, AdapterFileError, AdapterStack, TrainConfig, load_adapter, train
from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.attachment import attach
from lora_diffusion.families import family_of
from lora_diffusion.formats import FORMATS
from lora_diffusion.methods import METHODS, new_method
from lora_diffusion.training.objective import Flow, objective_for
from tests import tiny
from tests.training.pictures import pack


def auraflow(seed: int = 0) -> AuraFlowPipeline:
    """A tiny random AuraFlow."""
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = AuraFlowPipeline(tiny.t5_tokenizer(), tiny.t5(32).eval(), vae.eval(), transformer.eval(), scheduler)
    for part in (pipe.text_encoder, pipe.vae, pipe.transformer):
        part.requires_grad_(False)
    return pipe


def drawn(pipe: AuraFlowPipeline) -> np.ndarray:
    return tiny.picture(pipe, guidance_scale=1.0)


@pytest.mark.parametrize("n", [7, 384])
def test_fourierft_is_pefts(n: int) -> None:
    model, x = nn.ModuleDict({"to_q": nn.Linear(16, 24)}), torch.randn(5, 16)
    spectrum = torch.randn(n)
    with attach(model, new_method("fourierft", {"frequencies": n}), "to_q") as attachment:
        (_, ours), *_ = attachment.named_parameters()
        ours.data.copy_(spectrum)
        answer = model["to_q"](x)
        answer.square().sum().backward()
    peer = get_peft_model(model, FourierFTConfig(n_frequency=n, target_modules=["to_q"]))
    theirs = peer.base_model.model["to_q"].fourierft_spectrum["default"]
    theirs.data.copy_(spectrum)
    expected = peer.base_model.model["to_q"](x)
    expected.square().sum().backward()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-2)


def test_the_dotted_spelling_reports_what_it_does_not_know() -> None:
    dotted = FORMATS["dotted"]
    layer = LayerAdapter("fourierft", {"spectrum": torch.ones(3), "grid": torch.tensor([0, 2, 3])}, 150.0)
    tensors, metadata = dotted.dump(Adapter("a", {"unet": {"to_q": layer}}))
    parsed = dotted.load({**tensors, "extras/unet/to_q/lora/down": torch.ones(1, 3), "x": torch.ones(1)}, metadata)
    assert not parsed.layers
    assert set(parsed.unused) == {*tensors, "extras/unet/to_q/lora/down", "x"}
    assert "fourierft and lora on one layer" in parsed.unused["extras/unet/to_q/lora/down"]
    with pytest.raises(AdapterFileError, match="slash"):
        dotted.dump(Adapter("a", {"unet": {"to/q": layer}}))


@torch.no_grad()
def test_auraflow_predicts_what_the_pipeline_gives_its_scheduler() -> None:
    pipe = auraflow()
    family = family_of(pipe)
    assert family.name == "auraflow"
    assert objective_for(family, pipe.scheduler) == Flow(1.73)
    step, steps = pipe.scheduler.step, []

    def spy(answer: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, **kwargs: object) -> object:
        steps.append((answer, float(t), sample))
        return step(answer, t, sample, **kwargs)

    pipe.scheduler.step = spy
    drawn(pipe)
    conditioning = family.encode_prompts(pipe, ["a red fox"])
    for answer, t, seen in steps:
        ours = family.predict(pipe.transformer, seen, torch.tensor([t / 1000]), conditioning)
        torch.testing.assert_close(ours, answer, atol=1e-5, rtol=1e-5)
    assert len(steps) == 2


def test_the_method_trains_over_the_family_and_is_saved_in_the_format(tmp_path: Path) -> None:
    auraflow().save_pretrained(tmp_path / "base")
    config = {
        "name": "blocks",
        "base": str(tmp_path / "base"),
        "output": str(tmp_path / "out"),
        "data": {"folder": str(pack(tmp_path / "pack", 3)), "heldout": 0.34, "resolution": 32},
        "adapter": {"method": "fourierft", "settings": {"frequencies": 50}, "targets": "attention"},
        "backbone": {"device": "cpu"},
        "train": {"steps": 3, "batch": 2, "lr": 1.0, "warmup": 0},
    }
    result = train(TrainConfig.parse(config))
    assert result.adapter is not None
    adapter = load_adapter(result.adapter)
    assert (adapter.spelling, adapter.methods) == ("dotted", {"fourierft"})
    assert all(METHODS["fourierft"].scale(layer) == 150 for *_, layer in adapter)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain = drawn(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        assert np.abs(drawn(pipe) - plain).max() > 1e-3
    np.testing.assert_array_equal(drawn(pipe), plain)
