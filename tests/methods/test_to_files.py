"""Every method from a stack into one file, and into a model: merging and baking what is no low-rank pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_diffusion import Adapter, AdapterStack, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.merging import bake, merge
from lora_diffusion.methods import METHODS, is_dense
from tests import tiny
from tests.methods.test_in_use import random_adapter

OTHERS = sorted(name for name in METHODS if name not in ("lora", "norm", "set") and is_dense(name))


def norms(pipe: Any, method: str = "norm") -> Adapter:
    """Other scales, and for `norm` shifts, of every normalisation of the U-Net."""
    found = {name: layer for name, layer in pipe.unet.named_modules() if METHODS["norm"].supports(layer)}
    generator = torch.Generator().manual_seed(5)
    shares = {
        name: {key: 0.1 * torch.randn(layer.weight.shape, generator=generator) for key in ("w_norm", "b_norm")}
        for name, layer in found.items()
    }
    if method == "set":
        shares = {name: {"value": found[name].weight.detach() + share["w_norm"]} for name, share in shares.items()}
    return Adapter(method, {"unet": {name: LayerAdapter(method, tensors) for name, tensors in shares.items()}})


def stacked(pipe: Any, *weighted: tuple[Adapter, Any]) -> np.ndarray:
    with AdapterStack(pipe) as stack:
        for adapter, weight in weighted:
            stack.add(adapter, weight)
        return tiny.picture(pipe)


@pytest.mark.parametrize("method", OTHERS)
def test_a_merge_draws_what_the_stack_draws(sd: Any, method: str, tmp_path: Path) -> None:
    """Exactly, with a `full` layer in the file wherever one of the two is no pair."""
    other, pair = random_adapter(sd, method), random_adapter(sd, "lora")
    weighted = (other, 0.6), (pair, {"down": -0.4})
    true = stacked(sd, *weighted)
    merged = merge([other, pair], [weight for _, weight in weighted], base=sd)
    assert merged.kept == 1.0
    assert {layer.method for _, _, layer in merged.adapter} <= {"full", "lora"}
    save_adapter(merged.adapter, tmp_path / "merged.safetensors", format="kohya")
    np.testing.assert_allclose(stacked(sd, (load_adapter(tmp_path / "merged.safetensors"), 1.0)), true, atol=2e-5)


def test_a_merge_of_methods_at_a_rank_is_the_best_approximation(sd: Any) -> None:
    other, pair = random_adapter(sd, "lokr"), random_adapter(sd, "lora")
    exact, small = (merge([other, pair], [0.6, 1.0], base=sd, rank=rank) for rank in (None, 3))
    kept = whole = 0.0
    for (_, name, layer), (_, again, low) in zip(exact.adapter, small.adapter, strict=True):
        live = sd.unet.get_submodule(name)
        delta = METHODS["full"].delta(layer, live).flatten(1).double()
        values = torch.linalg.svdvals(delta)
        error = (delta - METHODS["lora"].delta(low, live).flatten(1)).norm()
        assert (name, low.method) == (again, "lora")
        torch.testing.assert_close(error, values[3:].norm(), rtol=1e-4, atol=1e-5)
        kept, whole = kept + float(values[:3].square().sum()), whole + float(values.square().sum())
    assert small.kept == pytest.approx(kept / whole, rel=1e-5)


@pytest.mark.parametrize("rule", ["slerp", "ties", "prune"])
def test_rules_take_dense_changes_as_they_take_pairs(sd: Any, rule: str) -> None:
    """The same two deltas, once as pairs and once as one pair and one `full` layer."""
    a, b = random_adapter(sd, "lora"), random_adapter(sd, "lora")
    full = {
        name: LayerAdapter("full", {"diff": METHODS["lora"].delta(layer, sd.unet.get_submodule(name))})
        for name, layer in b.layers["unet"].items()
    }
    weights = [0.3, 0.7]
    pairs = merge([a, b], weights, method=rule, rank=10_000).adapter
    dense = merge([a, Adapter("full", {"unet": full})], weights, method=rule, base=sd).adapter
    for _, name, layer in dense:
        theirs = METHODS["lora"].delta(pairs.layers["unet"][name], sd.unet.get_submodule(name))
        torch.testing.assert_close(layer.tensors["diff"], theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["norm", "set"])
def test_biases_and_norms_are_summed(sd: Any, method: str) -> None:
    name, layer = next((n, m) for n, m in sd.unet.named_modules() if isinstance(m, torch.nn.Conv2d))
    bias = Adapter("b", {"unet": {name: LayerAdapter("full", {"diff_b": torch.randn(layer.out_channels)})}})
    one = norms(sd, method)
    true = stacked(sd, (one, 0.5), (bias, -0.3))
    merged = merge([one, bias], [0.5, -0.3], base=sd).adapter
    np.testing.assert_allclose(stacked(sd, (merged, 1.0)), true, atol=2e-5)
    with pytest.raises(ConfigError, match="bias"):
        merge([bias], base=sd, rank=2)


def test_what_depends_on_the_base_needs_one_that_fits(sd: Any) -> None:
    one = random_adapter(sd, "ia3")
    with pytest.raises(ConfigError, match=r"ia3.*--base"):
        merge([one])
    with pytest.raises(AdapterMismatchError, match="find no place"):
        merge([one], base=tiny.flux())


@pytest.mark.parametrize("method", [*OTHERS, "norm", "set"])
def test_every_method_is_baked_into_a_folder(sd: Any, method: str, tmp_path: Path) -> None:
    sd.save_pretrained(tmp_path / "base")
    one = norms(sd, method) if method in ("norm", "set") else random_adapter(sd, method)
    baked = bake(tmp_path / "base", [(one, 0.5)], tmp_path / "baked")
    np.testing.assert_allclose(tiny.picture(type(sd).from_pretrained(baked.folder)), stacked(sd, (one, 0.5)), atol=2e-5)
    if method in ("norm", "set", "ia3"):
        return
    forced = bake(tmp_path / "base", [(one, 1000.0)], tmp_path / "small", precision="nf4", force=True)
    assert 0.75 < forced.kept < 1.1  # sparse deltas lose more to a grid of sixteen values
