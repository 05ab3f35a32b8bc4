"""From a blend to a file: every merge against dense float64, and models written and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_diffusion import Adapter, AdapterStack, LayerAdapter
from lora_diffusion.errors import AdapterMismatchError, ConfigError, TargetError
from lora_diffusion.families.names import places
from lora_diffusion.merging import bake, conflicts, cut, extract, merge, resize
from lora_diffusion.merging.conflicts import Conflict
from lora_diffusion.merging.picture import heat_map
from lora_diffusion.merging.rules import dare, della, prune, ties, trimmed
from lora_diffusion.methods import METHODS
from lora_diffusion.targets import find_targets
from tests import tiny
from tests.test_gates import adapter

SHAPES: dict[str, tuple[int, ...]] = {"mid_block.to_q": (12, 10), "up_blocks.0.conv": (8, 6, 3, 3)}


def random_adapter(name: str, rank: int, alpha: float, seed: int, *, flat: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, (out, *kernel) in SHAPES.items():
        up = torch.randn(out, rank, *(1,) * (len(kernel) - 1), generator=generator)
        tensors = {"down": torch.randn(rank, *kernel, generator=generator), "up": up}
        layers[layer.replace(".", "_") if flat else layer] = LayerAdapter("lora", tensors, alpha, "tensor")
    return Adapter(name, {"unet": layers})


def dense(one: Adapter, layer: str) -> Tensor:
    """up · down · alpha / rank in float64, by its definition."""
    layers = one.layers["unet"]
    pair = layers.get(layer) or layers[layer.replace(".", "_")]
    up, down = pair.tensors["up"].double().flatten(1), pair.tensors["down"].double().flatten(1)
    return (pair.alpha or 0.0) / len(down) * up @ down


A, B = random_adapter("a", 4, 2.0, 1), random_adapter("b", 3, 5.0, 2, flat=True)


@pytest.mark.parametrize("weights", [[0.8, -0.3], [1.0, 0.0], [-2.0, 1e-3]])
def test_the_sum_is_exact_for_mixed_ranks_spellings_and_signs(weights: list[float]) -> None:
    merged = merge([A, B], weights)
    assert merged.kept == 1.0
    for layer in SHAPES:
        true = weights[0] * dense(A, layer) + weights[1] * dense(B, layer)
        torch.testing.assert_close(dense(merged.adapter, layer), true, rtol=1e-5, atol=1e-5)
    assert merged.adapter.layers["unet"]["mid_block.to_q"].tensors["down"].shape[0] == (7 if weights[1] else 4)


def test_weights_by_block() -> None:
    merged = merge([A, B], [{"up": 0.5}, 0.0]).adapter
    assert list(merged.layers["unet"]) == ["up_blocks.0.conv"]
    torch.testing.assert_close(dense(merged, "up_blocks.0.conv"), 0.5 * dense(A, "up_blocks.0.conv"))


def test_a_chosen_rank_is_the_best_approximation_and_its_energy_is_told() -> None:
    merged = merge([A, B], [1.0, 1.0], rank=3)
    kept = whole = 0.0
    for layer in SHAPES:
        values = torch.linalg.svdvals(dense(A, layer) + dense(B, layer))
        error = (dense(merged.adapter, layer) - dense(A, layer) - dense(B, layer)).norm()
        torch.testing.assert_close(error, values[3:].norm(), rtol=1e-4, atol=1e-5)
        kept, whole = kept + float(values[:3].square().sum()), whole + float(values.square().sum())
    assert merged.kept == pytest.approx(kept / whole, rel=1e-6)


def test_slerp_keeps_the_angle_and_the_length() -> None:
    for t, end in ((0.0, A), (1.0, B)):
        merged = merge([A, B], [1 - t, t], method="slerp").adapter
        torch.testing.assert_close(dense(merged, "mid_block.to_q"), dense(end, "mid_block.to_q"), rtol=1e-4, atol=1e-5)
    equal = [dense(one, "mid_block.to_q") for one in (A, B)]
    cosine = torch.cosine_similarity(equal[0].flatten(), equal[1].flatten(), 0)
    angle = torch.acos(cosine)
    true = (equal[0] * torch.sin(angle / 4 * 3) + equal[1] * torch.sin(angle / 4)) / torch.sin(angle)
    merged = merge([A, B], [0.75, 0.25], method="slerp").adapter
    torch.testing.assert_close(dense(merged, "mid_block.to_q"), true, rtol=1e-4, atol=1e-5)


def test_ties_on_numbers_by_hand() -> None:
    random = torch.Generator()
    one, two = torch.tensor([[4.0, -1.0, 2.0, 0.1]]), torch.tensor([[2.0, 3.0, -4.0, 0.2]])
    assert trimmed(one, 0.5).tolist() == [[4, 0, 2, 0]]
    assert prune([one, two], 0.5, random).tolist() == [[4, 3, -2, 0]]
    assert ties([one, two], 0.5, random).tolist() == [[4, 3, -4, 0]]
    assert ties([one, two], 1.0, random)[0, :3].tolist() == [3, 3, -4]


@pytest.mark.parametrize("rule", [dare, della])
def test_dropping_keeps_the_expectation(rule: Any) -> None:
    random, delta = torch.Generator().manual_seed(0), torch.randn(20, 30).double()
    mean = torch.stack([rule([delta], 0.5, random) for _ in range(4000)]).mean(0)
    assert (mean - delta).norm() / delta.norm() < 0.03
    assert float((rule([delta], 0.5, random) == 0).float().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("method", ["prune", "ties", "dare", "della"])
def test_rules_at_full_density_and_full_rank_are_dense(method: str) -> None:
    merged = merge([A], [0.7], method=method, density=1.0).adapter
    torch.testing.assert_close(dense(merged, "mid_block.to_q"), 0.7 * dense(A, "mid_block.to_q"), rtol=1e-4, atol=1e-5)


def test_merges_that_cannot_be_are_refused() -> None:
    with pytest.raises(TargetError, match="did you mean 'ties'"):
        merge([A], method="tie")
    for wrong in ({"weights": [1.0]}, {"rank": 0}, {"density": 0.0}, {"weights": ["0@0,1@1", 1.0]}):
        with pytest.raises(ConfigError):
            merge([A, B], **wrong)
    with pytest.raises(ConfigError, match="0 on every layer"):
        merge([A, B], [0.0, 0.0])
    with pytest.raises(ConfigError, match="seed is 'x'"):
        merge([A, B], seed="x")  # type: ignore[arg-type]
    other = LayerAdapter("lora", {"down": torch.zeros(1, 5), "up": torch.zeros(12, 1)}, 1.0)
    with pytest.raises(AdapterMismatchError, match=r"\(12, 5\)"):
        merge([A, Adapter("c", {"unet": {"mid_block.to_q": other}})])


def test_resize_by_rank_energy_and_norm() -> None:
    smaller = resize(A, rank=2)
    assert set(smaller.ranks.values()) == {2}
    torch.testing.assert_close(
        (dense(smaller.adapter, "mid_block.to_q") - dense(A, "mid_block.to_q")).norm(),
        torch.linalg.svdvals(dense(A, "mid_block.to_q"))[2:].norm(),
    )
    same = resize(A, energy=1.0)
    assert set(same.ranks.values()) == {4}
    torch.testing.assert_close(dense(same.adapter, "up_blocks.0.conv"), dense(A, "up_blocks.0.conv"))
    by_energy, by_norm = resize(A, energy=0.81), resize(A, frobenius=0.9)
    assert by_energy.ranks == by_norm.ranks
    assert by_energy.kept >= 0.81
    for layer, rank in by_energy.ranks.items():
        energy = torch.linalg.svdvals(dense(A, layer[1])).square()
        assert rank == 1 or float(energy[: rank - 1].sum() / energy.sum()) < 0.81
    for wrong in ({}, {"energy": 0.0}, {"frobenius": -0.5}, {"frobenius": 1.5}, {"energy": 0.9, "frobenius": 0.9}):
        with pytest.raises(ConfigError, match="resize"):
            resize(A, **wrong)


@pytest.mark.parametrize("shrunk", [lambda a: resize(a, rank=2), lambda a: cut(a, 2)])
def test_losses_of_the_larger_adapter_are_not_said_of_the_smaller(shrunk: Any) -> None:
    facts, losses = {"base": "sd"}, {"heldout_loss_adapter": 0.1, "heldout_loss_base": 0.2}
    said = {"lora_diffusion": json.dumps(facts | losses), "modelspec.trigger_phrase": "fox"}
    smaller = shrunk(replace(A, metadata=said)).adapter
    assert smaller.metadata == said | {"lora_diffusion": json.dumps(facts, sort_keys=True)}
    for others in ({}, {"lora_diffusion": "no JSON"}, {"lora_diffusion": "[1]"}):
        assert shrunk(replace(A, metadata=others)).adapter.metadata == others


def test_a_nested_adapter_is_cut_to_its_first_rows() -> None:
    smaller = cut(A, 2)
    assert set(smaller.ranks.values()) == {2}
    for component, name, layer in A:
        one = smaller.adapter.layers[component][name]
        scale = layer.alpha / layer.tensors["down"].shape[0]
        expected = scale * layer.tensors["up"][:, :2].flatten(1) @ layer.tensors["down"][:2].flatten(1)
        torch.testing.assert_close(one.tensors["up"].flatten(1) @ one.tensors["down"].flatten(1), expected)
    assert 0 < smaller.kept < 1
    assert cut(A, 99).kept == 1.0
    with pytest.raises(ConfigError, match="rank is 0"):
        cut(A, 0)


def test_conflicts_of_known_pairs() -> None:
    assert all(
        (c.columns, c.rows, c.signs, c.ratio) == pytest.approx((1, 1, 0, 0.5))
        for c in conflicts([A, merge([A], [2]).adapter])
    )
    against = conflicts([A, merge([A], [-1.0]).adapter])
    assert [c.block for c in against] == ["mid", "up.0"]
    assert all(c.signs == pytest.approx(1) and c.weights == pytest.approx((1, 1)) for c in against)
    eye = torch.eye(12, 10)
    apart = [LayerAdapter("lora", {"down": eye[i : i + 1], "up": eye.t()[i : i + 1].t()}, 1.0) for i in (0, 1)]
    (row,) = conflicts([Adapter(n, {"unet": {"mid_block.q": one}}) for n, one in zip("ab", apart, strict=True)])
    assert (row.columns, row.rows) == (0, 0)


def test_other_methods_are_resized_and_compared_over_their_base(sd: Any) -> None:
    layers = {n: m for n, m in find_targets(sd.unet, "attention").items() if n.endswith(("to_q", "to_k"))}
    random = torch.Generator().manual_seed(3)
    loha = {name: METHODS["loha"](rank=2).fresh(layer, random) for name, layer in layers.items()}
    for layer in loha.values():
        for tensor in layer.tensors.values():
            tensor.normal_(generator=random)
    name, layer = next(iter(layers.items()))
    delta = METHODS["loha"].delta(loha[name], layer).double()
    one = Adapter("one", {"unet": loha})
    with pytest.raises(ConfigError, match="'loha' changes depends on the base model"):
        resize(one, rank=2)
    smaller = resize(one, rank=3, base=sd)
    best, rest = dense(smaller.adapter, name), torch.linalg.svdvals(delta)[3:]
    torch.testing.assert_close((best - delta).norm(), rest.norm(), rtol=1e-4, atol=1e-6)
    assert resize(one, energy=1.0, base=sd).kept == pytest.approx(1.0)
    twice = Adapter("twice", {"unet": {n: replace(a, alpha=2 * (a.alpha or 1)) for n, a in loha.items()}})
    with pytest.raises(ConfigError, match="depends on the base model"):
        conflicts([one, twice])
    rows = conflicts([one, twice], sd)
    assert {row.block for row in rows} >= {"mid", "up.0"}
    assert all((r.columns, r.rows, r.signs, r.ratio) == pytest.approx((1, 1, 0, 0.5)) for r in rows)


def test_the_heat_map_shows_each_figure_as_a_colour() -> None:
    def row(pair: tuple[str, str], block: str, value: float) -> Conflict:
        return Conflict(*pair, "unet", block, value, 0.0, 0.5, 1.0, (1.0, 1.0))

    picture = heat_map([row(("a", "b"), "down.0", 0.0), row(("a", "b"), "mid", 1.0), row(("a", "c"), "mid", 0.5)])
    colours = {colour for _, colour in picture.getcolors(1 << 16) or []}
    assert {(247, 250, 252), (253, 184, 99), (165, 15, 21), (236, 236, 240)} <= colours  # 0, 0.5, 1, not met
    taller = heat_map([row(("a", "b"), f"down.{i}", 0.1) for i in range(4)])
    assert (taller.height - picture.height, taller.width < picture.width) == (60, True)
    with pytest.raises(ConfigError, match="nothing to draw"):
        heat_map([])


@pytest.fixture
def base(sd: Any, tmp_path: Path) -> Path:
    sd.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_bake_then_extract_gives_the_adapter_back(sd: Any, base: Path, tmp_path: Path) -> None:
    one = adapter(sd)
    baked = bake(base, [(one, 0.8)], tmp_path / "baked")
    assert (baked.precision, baked.kept) == ("fp32", 1.0)
    pipe = type(sd).from_pretrained(baked.folder)
    with AdapterStack(sd) as stack:
        stack.add(one, 0.8)
        np.testing.assert_allclose(tiny.picture(pipe), tiny.picture(sd), atol=1e-5)
    found = extract(tmp_path / "baked", base, rank=2)
    assert found.kept > 0.9999
    assert not found.left_out
    with AdapterStack(sd) as stack:
        stack.add(found.adapter)
        np.testing.assert_allclose(tiny.picture(pipe), tiny.picture(sd), atol=1e-4)
    with pytest.raises(ConfigError, match="not empty"):
        bake(base, [(one, 0.8)], tmp_path / "baked")
    with pytest.raises(AdapterMismatchError, match="no linear layer"):
        extract(base, base)


def test_extract_names_what_no_adapter_can_hold(sd: Any) -> None:
    tuned = tiny.sd()
    tuned.unet.conv_in.bias.data += 1
    tuned.unet.mid_block.attentions[0].proj_in.weight.data += 0.1
    found = extract(tuned, sd, rank=4)
    assert found.left_out == ["unet.conv_in.bias"]
    assert list(found.adapter.layers["unet"]) == ["mid_block.attentions.0.proj_in"]
    assert found.adapter.layers["unet"]["mid_block.attentions.0.proj_in"].tensors["down"].shape[0] <= 4


@pytest.mark.parametrize("names", ["checkpoint", "diffusers"])
def test_extract_reads_a_checkpoint_in_one_file(sd: Any, base: Path, tmp_path: Path, names: str) -> None:
    tuned, path = tiny.sd().unet, tmp_path / "tuned.safetensors"
    changed = [name for name in find_targets(tuned, "attention") if name.endswith("to_q")]
    for name in changed:
        tuned.get_submodule(name).weight.data += 0.1 * torch.randn(tuned.get_submodule(name).weight.shape)
    state, layers = tuned.state_dict(), {key.rpartition(".")[0] for key in tuned.state_dict()}
    back = {place.layers[0]: name for name, place in places("UNet2DConditionModel", layers).items()}
    if names == "checkpoint":
        parts = {key: key.rpartition(".") for key in state}
        state = {f"model.diffusion_model.{back[parts[key][0]]}.{parts[key][2]}": state[key] for key in state}
    save_file({key: tensor.half().contiguous() for key, tensor in state.items()}, path)  # the base is in float32
    found = extract(path, base, rank=64)
    assert sorted(found.adapter.layers["unet"]) == sorted(changed)  # float16 changed no other
    assert not found.left_out
    weight = sd.unet.get_submodule(changed[0]).weight
    torch.testing.assert_close(
        dense(found.adapter, changed[0]).float(), tuned.get_submodule(changed[0]).weight - weight, rtol=0, atol=1e-3
    )
    with pytest.raises(ConfigError, match="base must be a Diffusers folder"):
        extract(path, sd)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model_index.json").write_text('{"_class_name": "AutoPipeline", "vae": ["diffusers", "X"]}')
    with pytest.raises(ConfigError, match="has no unet or transformer"):
        extract(path, tmp_path / "bare")
    tiny.sdxl().save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterMismatchError, match="cannot be read as a StableDiffusionXLPipeline"):
        extract(path, tmp_path / "other")
    path.write_bytes(b"<html>")
    with pytest.raises(ConfigError, match="cannot be read as model weights"):
        extract(path, base)
