"""VeRA against PEFT's on the same tensors, and what its layers share; PEFT folders are in tests/formats."""

from __future__ import annotations

import pytest
import torch
from peft import VeraConfig, get_peft_model
from torch import nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.attachment import attach
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.methods.projections import projections
from lora_diffusion.methods.vera import VeRA, VeRABranch
from lora_diffusion.quantize import quantize


def three_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 40), nn.Linear(40, 12))


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_projections_outputs_and_gradients_are_pefts(precision: str) -> None:
    """The projections to the bit, the rest to rounding, over whole and over 4-bit layers."""
    model = three_layers()
    if precision == "nf4":
        quantize(model, "nf4", compute_dtype=torch.float32)
    x, vectors = torch.randn(3, 16), [(torch.randn(5), torch.randn(out)) for out in (24, 40, 12)]
    with attach(model, VeRA(5, seed=7), ["0", "1", "2"]) as attachment:
        adapter = attachment.adapter("mine")
        for layer, (d, b) in zip(adapter.layers["unet"].values(), vectors, strict=True):
            layer.tensors["d"].copy_(d)
            layer.tensors["b"].copy_(b)
        attachment.load(adapter)
        ours = model(x)
        ours.square().mean().backward()
        grads = {name: parameter.grad for name, parameter in attachment.named_parameters()}
    config = VeraConfig(r=5, target_modules=["0", "1", "2"], projection_prng_key=7)
    theirs = get_peft_model(model, config).base_model.model
    pair = projections((7, 40, 40), 5, torch.device("cpu"))
    assert torch.equal(pair.A, theirs[0].vera_A["default"])
    assert torch.equal(pair.B, theirs[0].vera_B["default"])
    for layer, (d, b) in zip(theirs, vectors, strict=True):
        layer.vera_lambda_d["default"].data.copy_(d)
        layer.vera_lambda_b["default"].data.copy_(b)
    expected = theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
    expected.square().mean().backward()
    for i, layer in enumerate(theirs):
        for part, held in (("d", layer.vera_lambda_d), ("b", layer.vera_lambda_b)):
            found, wanted = grads[f"{i}.{part}"], held["default"].grad
            assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_layers_share_one_pair_and_an_adapter_of_another_seed_is_refused() -> None:
    model = three_layers()
    with attach(model, VeRA(5), ["0", "1"]) as attachment:
        model(torch.randn(3, 16))
        branches = [slot.branches[0] for slot in attachment.slots.values()]
        first, second = (branch.shared for branch in branches if isinstance(branch, VeRABranch))
        assert first is second is not None
        adapter = attachment.adapter("mine")
        assert sum(parameter.numel() for parameter in attachment.parameters()) == 5 + 24 + 5 + 40
    differs = pytest.raises(AdapterMismatchError, match=r"projection is \[0, 40, 24\]; expected \[1, 40, 24\]")
    with attach(model, VeRA(5, seed=1), ["0", "1"]) as attachment, differs:
        attachment.load(adapter)


def test_a_projection_that_cannot_be_is_refused_before_it_is_drawn() -> None:
    layer = nn.Linear(16, 24)
    fresh = VeRA(4).fresh(layer)
    cases = {"(24, 16)": [0, 23, 16], "131072": [0, 1 << 40, 16], "-1": [-1, 24, 16], "three": [0]}
    for found, numbers in cases.items():
        adapter = LayerAdapter("vera", {**fresh.tensors, "projection": torch.tensor(numbers)})
        fault = VeRA.check(adapter, layer)
        assert fault is not None
        assert found in fault


@pytest.mark.parametrize("settings", [{"rank": 0}, {"seed": -1}])
def test_settings_without_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="vera: rank"):
        VeRA(**settings)
