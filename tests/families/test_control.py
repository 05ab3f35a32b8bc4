"""BFL's Control LoRA of FLUX: Diffusers, which widens and overwrites the model, computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterMismatchError, AdapterStack, load_adapter
from lora_diffusion.families.control import widen_for_control
from lora_diffusion.families.names import places
from lora_diffusion.families.skeletons import skeleton
from lora_diffusion.fitting import fit
from lora_diffusion.formats.identity import family_of
from lora_diffusion.formats.provenance import named_layers
from lora_diffusion.inspection.coverage import cover
from tests import tiny
from tests.formats.test_real_keys import parsed

CHANNELS = 16
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def control_pipe() -> FluxControlPipeline:
    parts = tiny.flux().components
    return FluxControlPipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    )


def control_lora(model: nn.Module, spelling: str) -> dict[str, Tensor]:
    """A pair with a bias for every linear layer, the entrance twice as wide, and the norms of queries and keys.

    The same in both spellings: as Diffusers writes it, and as BFL does, with q, k and v fused over one `down`.
    """
    live = dict(model.named_modules())
    torch.manual_seed(0)
    names = {n: p for n, p in places(type(model).__name__, live).items() if "linear1.qkv" not in n}
    fused = {n: p for n, p in names.items() if n.rpartition(".")[0] not in names}
    tensors: dict[str, Tensor] = {}
    for name, place in fused.items():
        modules = [live[layer] for layer in place.layers]
        stems = [f"transformer.{layer}" for layer in place.layers] if spelling == "diffusers" else [name]
        if not isinstance(modules[0], nn.Linear):
            value = torch.rand(modules[0].weight.shape) + 0.5
            tensors[f"{stems[0]}.weight" if spelling == "diffusers" else f"{name}.scale"] = value
            continue
        widths = [module.out_features for module in modules]
        down = torch.randn(2, modules[0].in_features * (2 if name == "img_in" else 1)) * 0.2
        up, bias = torch.randn(sum(widths), 2) * 0.2, torch.randn(sum(widths)) * 0.2
        parts = [(up, bias)]
        if spelling == "diffusers":
            if place.swapped:
                up, bias = up.roll(len(up) // 2, 0), bias.roll(len(bias) // 2, 0)
            parts = list(zip(up.split(widths), bias.split(widths), strict=True))
        for stem, (rows, shift) in zip(stems, parts, strict=True):
            tensors |= {f"{stem}.lora_A.weight": down.clone(), f"{stem}.lora_B.weight": rows.contiguous()}
            tensors[f"{stem}.lora_B.bias"] = shift.contiguous()
    return tensors


def answer(pipe: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return pipe.transformer(
            hidden_states=torch.randn(2, 4, 2 * CHANNELS),
            encoder_hidden_states=torch.randn(2, 3, 32),
            pooled_projections=torch.randn(2, 32),
            timestep=torch.tensor([0.5, 0.3]),
            guidance=torch.ones(2),
            img_ids=torch.randn(4, 3).round(),
            txt_ids=torch.zeros(3, 3),
        ).sample


@pytest.mark.parametrize("spelling", ["diffusers", "bfl"])
def test_a_control_lora_computes_what_diffusers_computes(spelling: str, tmp_path: Path):
    theirs, ours = control_pipe(), control_pipe()
    theirs.load_lora_weights(control_lora(theirs.transformer, "diffusers"))
    widen_for_control(ours)
    base = answer(ours)
    state = {name: value.clone() for name, value in ours.transformer.state_dict().items()}
    save_file(control_lora(control_pipe().transformer, spelling), tmp_path / "control.safetensors")
    stack = AdapterStack(ours)
    stack.add(load_adapter(tmp_path / "control.safetensors"))
    expected = answer(theirs)
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(answer(ours), expected, rtol=1e-4, atol=1e-4)
    stack.clear()
    assert torch.equal(answer(ours), base)
    assert all(torch.equal(state[name], value) for name, value in ours.transformer.state_dict().items())


def test_a_widened_pipeline_draws_and_its_control_picture_has_no_weight():
    pipe = control_pipe()
    widen_for_control(pipe)
    pictures = [
        pipe(
            "a fox",
            control_image=torch.full((1, 3, 32, 32), grey),
            height=32,
            width=32,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for grey in (0.0, 1.0)
    ]
    assert torch.equal(*pictures)


def test_on_a_pipeline_without_a_control_picture_it_is_an_error_that_says_what_it_is(tmp_path: Path):
    pipe = tiny.flux()
    save_file(control_lora(pipe.transformer, "bfl"), tmp_path / "control.safetensors")
    stack = AdapterStack(pipe)
    with pytest.raises(AdapterMismatchError, match=r"img_in: .*Control LoRA.* 32 in all: use a FluxControlPipeline"):
        stack.add(load_adapter(tmp_path / "control.safetensors"))
    assert not len(stack)


def test_the_published_one_finds_a_place_for_every_tensor_but_the_entrance_of_the_plain_model():
    read = parsed("flux_control_lora")
    assert not read.unused
    adapter = Adapter("depth", read.layers)
    models = skeleton("FLUX.1")
    found = fit(adapter, models, finite=True)
    assert list(found.unplaced) == ["transformer.img_in"]
    transformer: Any = models["transformer"]
    transformer.x_embedder = nn.Linear(128, 3072, device="meta")
    found = fit(adapter, models, finite=True)
    assert not found.unplaced
    layers = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) or n.endswith(NORMS)}
    assert {layer for _, layer in found.layers} == layers
    assert sum(pair.method == "set" for pair in found.layers.values()) == 4 * 19 + 2 * 38


@pytest.mark.parametrize(("name", "why"), [("flux_control_lora", "Control LoRA"), ("flux_lora_diffusers", "named")])
def test_the_family_of_published_lists_is_known_and_why(name: str, why: str):
    family = family_of(named_layers(Adapter(name, parsed(name).layers)))
    assert (family.name, why in family.why) == ("FLUX.1", True)


def test_the_report_is_complete_on_a_widened_model_and_else_names_the_entrance(tmp_path: Path):
    plain, wide = control_pipe(), control_pipe()
    widen_for_control(wide)
    save_file(control_lora(plain.transformer, "bfl"), tmp_path / "control.safetensors")
    adapter = load_adapter(tmp_path / "control.safetensors")
    report = cover(adapter, wide)
    assert (report.complete, report.unused, report.unplaced) == (True, {}, {})
    assert report.placed == len([m for m in wide.transformer.modules() if isinstance(m, nn.Linear)]) + 2 * 4 + 2 * 2
    (unplaced,) = cover(adapter, plain).unplaced.items()
    assert unplaced[0] == "transformer.img_in"
    assert "Control LoRA" in unplaced[1]
