"""T-LoRA against LyCORIS' module on the same tensors, and its gate by noise in training and on a pipeline."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, compute_timestep_mask, set_timestep_mask
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from lora_diffusion import (
    Adapter,
    AdapterFileError,
    AdapterStack,
    ConfigError,
    LayerAdapter,
    LoRA,
    TrainConfig,
    load_adapter,
    merge,
    resize,
    save_adapter,
    train,
)
from lora_diffusion.attachment import attach
from lora_diffusion.cli.resize import resize as resize_command
from lora_diffusion.gates.fading import KEY, Fading, fading_of
from lora_diffusion.methods.ia3 import IA3, IA3Branch
from lora_diffusion.methods.tlora import TLoRA, TLoRABranch
from lora_diffusion.targets import find_targets
from tests import tiny
from tests.training.pictures import settings

PARTS = {"down": "q_layer.weight", "sigma": "lambda_layer", "up": "p_layer.weight"}
STARTS = {"start_down": "base_q", "start_sigma": "base_lambda", "start_up": "base_p"}


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_ranks_by_noise_are_lycoris_mask(power: float) -> None:
    fading = Fading(3, power)
    for t in range(0, 1000, 7):
        theirs = compute_timestep_mask(t, 1000, 16, min_rank=3, alpha=power)
        assert fading.ranks(16, t / 1000) == int(theirs.sum()), t
    assert Fading(3, power, rows=2).active(32, 0.0) == 32
    assert [fading.ranks(rank, noise) for rank, noise in ((2, 1.0), (16, -0.5), (16, 1.5))] == [2, 16, 3]


@pytest.mark.parametrize("parts", ["principal", "middle", "last"])
def test_start_output_and_gradients_are_lycoris(parts: Any) -> None:
    layer, x = nn.Linear(16, 24), torch.randn(3, 5, 16)
    theirs = TLoraModule("a", layer, lora_dim=6, alpha=9.0, sig_type=parts, bypass_mode=True)
    held = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    method = TLoRA(6, 9.0, source="weight", parts=parts, min_rank=2)
    with attach(nn.ModuleDict({"to_q": layer}), method, "to_q") as attachment:
        branch = attachment.slots["to_q"].branches[0]
        assert isinstance(branch, TLoRABranch)
        for key, name in {**PARTS, **STARTS}.items():
            ours, wanted = branch.held[key], held[name].detach().reshape(branch.held[key].shape)
            torch.testing.assert_close(ours.abs(), wanted.abs(), rtol=1e-3, atol=1e-5)
            moved = wanted if key in STARTS else wanted + 0.3 * torch.randn_like(wanted)
            ours.data.copy_(moved)
            held[name].data.copy_(moved.reshape(held[name].shape))
        attachment.at(torch.full((3,), 0.7))
        set_timestep_mask(compute_timestep_mask(700, 1000, 6, min_rank=2))
        try:
            expected = layer.forward(x) + theirs.bypass_forward_diff(x)
        finally:
            clear_timestep_mask()
        found = layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.square().sum().backward()
        expected.square().sum().backward()
        for key, name in PARTS.items():
            grad, wanted = branch.held[key].grad, held[name].grad
            assert grad is not None
            assert wanted is not None
            torch.testing.assert_close(grad, wanted.reshape(grad.shape), rtol=1e-3, atol=1e-4)
        assert [name for name, _ in attachment.named_parameters()] == [f"to_q.{part}" for part in PARTS]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_each_picture_of_a_batch_has_the_ranks_of_its_noise(kind: str) -> None:
    layer = nn.Linear(16, 24) if kind == "linear" else nn.Conv2d(8, 12, 3)
    x = torch.randn(2, *((5, 16) if kind == "linear" else (8, 6, 6)))
    with attach(nn.ModuleDict({"to_q": layer}), TLoRA(6, min_rank=1), "to_q") as attachment:
        for parameter in attachment.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        attachment.at(torch.tensor([1.0, 0.0]))
        both = layer(x)
        for row, noise in enumerate((1.0, 0.0)):
            attachment.at(torch.tensor([noise]))
            torch.testing.assert_close(both[row], layer(x[row : row + 1])[0], rtol=1e-4, atol=1e-5)
        assert (layer(x[:1]) - both[:1]).abs().max() > 1e-3
        with pytest.raises(ConfigError, match="noise of 1 pictures"):
            layer(x)


def faded(pipe: Any, min_rank: int, rank: int = 6) -> Adapter:
    layers = {name: LoRA(rank).fresh(layer) for name, layer in find_targets(pipe.unet, "attention+conv").items()}
    for layer in layers.values():
        layer.tensors["up"].normal_(std=0.2)
    return Adapter("faded", {"unet": layers}, metadata=Fading(min_rank).metadata())


def test_on_a_pipeline_only_the_ranks_of_each_steps_noise_act() -> None:
    """What the denoiser answers at a timestep is what the first ranks alone answer there, stacked and live too."""
    pipe = tiny.sd()
    adapter = faded(pipe, 1)
    pipe.scheduler.set_timesteps(4)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    with AdapterStack(pipe) as stack, torch.no_grad():
        stack.add(adapter, 0.8)
        for t in pipe.scheduler.timesteps:
            stack.weigh("faded", 0.8)
            ranks = Fading(1).ranks(6, float(t) / 1000)
            assert 1 <= ranks < 6
            found = pipe.unet(x, t, text).sample
            stack.weigh("faded", [0.8, 0.8])
            torch.testing.assert_close(pipe.unet(x, t, text).sample, found, rtol=1e-4, atol=1e-4)
            first = {}
            for name, layer in adapter.layers["unet"].items():
                down, up = layer.tensors["down"], layer.tensors["up"]
                first[name] = LoRA(ranks, float(ranks)).of(
                    pipe.unet.get_submodule(name), down[:ranks].flatten(1), up[:, :ranks].flatten(1)
                )
            stack.weigh("faded", 0.0)
            stack.add(Adapter("first", {"unet": first}), 0.8)
            torch.testing.assert_close(pipe.unet(x, t, text).sample, found, rtol=1e-4, atol=1e-4)
            stack.remove("first")
        stack.weigh("faded", 0.8)
        with pytest.raises(ConfigError, match="by step"):
            stack.fuse()


def test_a_fading_to_no_less_than_all_ranks_is_none() -> None:
    pipe = tiny.sd()
    adapter = faded(pipe, 6)
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        ours = tiny.picture(pipe)
        stack.remove("faded")
        stack.add(Adapter("faded", adapter.layers))
        np.testing.assert_array_equal(tiny.picture(pipe), ours)
        stack.remove("faded")
        stack.add(faded(pipe, 0))
        assert np.abs(tiny.picture(pipe) - ours).max() > 1e-3


def test_damaged_metadata_are_refused_and_nothing_is_on() -> None:
    pipe = tiny.sd()
    for said in ("{}", "no JSON", json.dumps({"min_rank": -1, "power": 1, "rows": 1})):
        with AdapterStack(pipe) as stack, pytest.raises(AdapterFileError, match="expected min_rank"):
            stack.add(Adapter("a", faded(pipe, 1).layers, metadata={KEY: said}))
        assert not len(stack)
        assert not [m for m in pipe.unet.modules() if hasattr(m, "adapters")]
    assert fading_of({}, "a") is None


@pytest.mark.parametrize("given", [{"min_rank": 9}, {"power": 0.0}])
def test_settings_without_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tlora: min_rank"):
        TLoRA(8, **given)
    with pytest.raises(ConfigError, match="singular parts only"):
        TLoRA(8).fresh(nn.Linear(4, 16))


def test_it_trains_from_a_configuration_and_is_drawn_as_it_was_trained(tmp_path: Path) -> None:
    given = settings(tmp_path, lr=2e-2, steps=4)
    given["adapter"] |= {"method": "tlora", "settings": {"min_rank": 1}}
    noises: list[Tensor] = []
    fade = TLoRABranch.fade

    def note(self: TLoRABranch, fading: Fading, noise: Tensor) -> None:
        noises.append(noise)
        fade(self, fading, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TLoRABranch, "fade", note)
        result = train(TrainConfig.parse(given))
    assert all(noise.min() >= 0 and noise.max() < 1 for noise in noises)
    assert len({float(noise[0]) for noise in noises}) > 4
    assert result.adapter is not None
    assert result.backbone_unchanged
    adapter = load_adapter(result.adapter)
    assert adapter.methods == {"lora"}
    assert {len(layer.tensors["down"]) for *_, layer in adapter} == {8}
    assert fading_of(adapter.metadata, "a") == Fading(1, 1.0, 2)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        ours = tiny.picture(pipe)
        stack.remove(adapter.name)
        stack.add(Adapter("whole", adapter.layers))
        whole = tiny.picture(pipe)
    assert np.abs(ours - whole).max() > 1e-4
    pipe.load_lora_weights(result.adapter)  # elsewhere all ranks act
    np.testing.assert_allclose(whole, tiny.picture(pipe), atol=1e-4)


class Dimmed(IA3Branch):
    """A branch from outside that asks for the noise."""

    noise: torch.Tensor | None = None

    def fade(self, fading: Fading, noise: torch.Tensor) -> None:
        self.noise = noise * fading.power


class Dimming(IA3):
    """A method from outside that fades."""

    fading = Fading(1, 2.0)

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Dimmed:
        return Dimmed(name, adapter.tensors)


def test_a_method_from_outside_can_fade_and_others_are_not_asked() -> None:
    model = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
    for method, heard in ((Dimming(), [0.5, 1.5]), (IA3(), None)):
        with attach(model, method, "to_q") as attachment:
            attachment.at(torch.tensor([0.25, 0.75]))
            (branch,) = attachment.slots["to_q"].branches
            noise = getattr(branch, "noise", None)
            assert (noise if noise is None else noise.tolist()) == heard
            assert bool(attachment.adapter("x").metadata) == bool(heard)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_lycoris_files_begin_with_the_weights_principal_parts(tmp_path: Path, prefix: str) -> None:
    """They do not hold where they began; LyCORIS takes it of the live weight when it reads them, and so do we."""
    pipe = tiny.sd()
    name, layer = next(iter(find_targets(pipe.unet, "*.attn2.to_q").items()))
    trained = TLoraModule("a", layer, lora_dim=3, alpha=2.0)
    for tensor in (trained.q_layer.weight, trained.p_layer.weight, trained.lambda_layer):
        tensor.data.add_(0.1 * torch.randn_like(tensor))
    kept = {key: tensor.detach().contiguous() for key, tensor in trained.custom_state_dict().items()}
    flat = f"{prefix}{name.replace('.', '_')}"
    save_file({f"{flat}.{key}": tensor for key, tensor in kept.items()}, tmp_path / "theirs.safetensors")
    adapter = load_adapter(tmp_path / "theirs.safetensors")
    assert adapter.methods == {"tlora"}
    tensors = (kept["q_layer.weight"], kept["p_layer.weight"], kept["lambda_layer"], kept["alpha"])
    again = TLoraModule.make_module_from_state_dict("a", layer, *tensors)
    change = again.get_diff_weight()[0].detach()
    x = torch.randn(2, 5, layer.in_features)
    with torch.no_grad(), AdapterStack(pipe) as stack:
        base = layer.forward(x)
        stack.add(adapter, 0.5)
        torch.testing.assert_close(layer(x), base + 0.5 * x @ change.t(), rtol=1e-4, atol=1e-4)
        written = load_adapter(save_adapter(adapter, tmp_path / "ours.safetensors", format="kohya"))
        assert written == adapter
    merged = merge([adapter], [0.5], base=pipe).adapter.layers["unet"][name]
    torch.testing.assert_close(merged.tensors["diff"], 0.5 * change, rtol=1e-4, atol=1e-5)


def test_merging_and_resizing_say_that_all_ranks_act(tmp_path: Path) -> None:
    pipe = tiny.sd()
    with attach(pipe.unet, TLoRA(4), "attention") as attachment:
        for parameter in attachment.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        adapter = attachment.adapter("faded")
    assert KEY in adapter.metadata
    for make in (lambda: merge([adapter, adapter]).adapter, lambda: resize(adapter, rank=3).adapter):
        with pytest.warns(UserWarning, match=r"'faded' was trained with fewer ranks.*every step"):
            made = make()
        assert KEY not in made.metadata
    save_adapter(adapter, tmp_path / "faded.safetensors")
    app = typer.Typer()
    app.command()(resize_command)
    out = tmp_path / "small.safetensors"
    said = CliRunner().invoke(app, [str(tmp_path / "faded.safetensors"), "--rank", "2", "-o", str(out)]).output
    assert said.count("note: resize: adapter 'faded' was trained with fewer ranks") == 1
    assert KEY not in load_adapter(out).metadata
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge([made])
