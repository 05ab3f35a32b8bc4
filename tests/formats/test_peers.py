"""What we write, as peers read it: PEFT predicts and LyCORIS merges the same (for Diffusers see `test_pictures.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from lycoris.modules import get_module, make_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterFileError, AdapterStack, LayerAdapter, load_adapter
from lora_diffusion.attachment import attach
from lora_diffusion.fitting import fit
from lora_diffusion.formats import container
from lora_diffusion.formats.kohya import KOHYA
from lora_diffusion.formats.peft_folder import save_peft_folder
from lora_diffusion.fusing import fuse
from lora_diffusion.lora import Slot, place, take_off
from lora_diffusion.methods import METHODS, Method, new_method, written
from lora_diffusion.methods.vera import VeRA
from tests import tiny
from tests.formats import random_adapters


def quiet(adapter: Adapter, *, alpha: float | None = None, method: str = "lora") -> Adapter:
    """At a strength that leaves a picture; with one alpha for all, where the peer mixes up alphas that differ."""
    layers = {
        component: {
            name: replace(
                layer,
                method=method,
                tensors={part: tensor * 0.1 for part, tensor in layer.tensors.items()},
                alpha=layer.alpha if alpha is None else alpha,
            )
            for name, layer in of.items()
        }
        for component, of in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_predicts_what_we_predict(method: str, tmp_path: Path):
    unet = tiny.unet()
    adapter = quiet(random_adapters.over(tiny.sd(), "unet"), method=method)
    if method == "dora":
        for name, layer in adapter.layers["unet"].items():
            rows = unet.get_submodule(name).weight.shape[0]
            adapter.layers["unet"][name] = replace(layer, tensors={**layer.tensors, "magnitude": torch.rand(rows) + 1})
    folder = save_peft_folder(adapter, tmp_path / "folder")
    assert load_adapter(folder) == adapter
    pipe = tiny.sd()
    stack = AdapterStack(pipe)
    stack.add(load_adapter(folder))
    ours = tiny.predict(pipe.unet, torch.float32)
    theirs = PeftModel.from_pretrained(unet, folder).base_model.model
    held = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert held == adapter.layers["unet"].keys()
    assert tiny.error(ours, tiny.predict(theirs, torch.float32)) < 1e-5


def test_peft_draws_the_same_projections_for_a_vera_folder(tmp_path: Path):
    unet = tiny.unet()
    with attach(unet, VeRA(5, seed=3), "attention+ff") as attachment:
        adapter = attachment.adapter("mine")
    for layer in adapter.layers["unet"].values():
        for part in ("d", "b"):
            layer.tensors[part].normal_(0, 0.3)
    folder = save_peft_folder(adapter, tmp_path / "folder")
    again = load_adapter(folder)
    assert again == adapter
    pipe = tiny.sd()
    base = tiny.predict(pipe.unet, torch.float32)
    AdapterStack(pipe).add(again)
    ours = tiny.predict(pipe.unet, torch.float32)
    with pytest.warns(UserWarning, match="PRNG"):
        theirs = PeftModel.from_pretrained(unet, folder).base_model.model
    held = {name for name, module in theirs.named_modules() if hasattr(module, "vera_lambda_d")}
    assert held == adapter.layers["unet"].keys()
    assert tiny.error(ours, tiny.predict(theirs, torch.float32)) < 1e-5
    assert tiny.error(ours, base) > 1e-2


def test_a_vera_of_two_seeds_or_without_its_widest_layer_is_no_peft_folder(tmp_path: Path):
    layers = {
        "a": VeRA(4, sides=(9, 8)).fresh(nn.Linear(8, 6)),
        "b": VeRA(4, seed=1, sides=(9, 8)).fresh(nn.Linear(8, 9)),
    }
    with pytest.raises(AdapterFileError, match="one pair of projections"):
        save_peft_folder(Adapter("x", {"unet": layers}), tmp_path / "a")
    with pytest.raises(AdapterFileError, match="for 9 outputs"):
        save_peft_folder(Adapter("x", {"unet": {"a": layers["a"]}}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_peft_folder_is_written_whole_or_not_at_all(tmp_path: Path):
    two = random_adapters.over(tiny.sd(), "unet", "text_encoder")
    with pytest.raises(AdapterFileError, match="one denoiser"):
        save_peft_folder(two, tmp_path / "a")
    broken = random_adapters.over(tiny.sd(), "unet")
    broken.layers["unet"]["conv_in"].tensors["up"].fill_(float("nan"))
    with pytest.raises(AdapterFileError, match="finite"):
        save_peft_folder(broken, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterFileError, match="exists"):
        save_peft_folder(random_adapters.over(tiny.sd(), "unet"), tmp_path / "a")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 24),
    "conv": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "norm": lambda: nn.LayerNorm(16),
}


def filled(method: type[Method], layer: nn.Module) -> LayerAdapter:
    adapter = new_method(method.name, rank=4, alpha=6.0).fresh(layer)
    for part, tensor in adapter.tensors.items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if part == "magnitude" else tensor.normal_(0, 0.3)
    return adapter


#: LyCORIS 4.1 cannot open its own (IA)³ files: `make_module_from_state_dict` takes one tensor of the two it is given;
#: it has no VeRA, no bottleneck and no bias beside a pair
READ_BY_LYCORIS = [m for m in METHODS if m not in ("ia3", "vera", "bottleneck", "biased", "set")]


@pytest.mark.parametrize(
    ("method", "kind"),
    [(m, kind) for m in READ_BY_LYCORIS for kind, make in LAYERS.items() if METHODS[m].supports(make())],
)
def test_lycoris_merges_what_we_add(method: str, kind: str):
    layer = LAYERS[kind]().requires_grad_(requires_grad=False)
    adapter = filled(METHODS[method], layer)
    name = "down_blocks.0.layer"
    tensors, _ = KOHYA.dump(Adapter("x", {"unet": written({name: adapter})}))
    stem = "lora_unet_down_blocks_0_layer"
    theirs = make_module(*get_module(tensors, stem), stem, layer)
    if method == "loha":  # its merge multiplies by alpha / rank twice; its forward, once
        merged = layer.weight + theirs.get_weight(layer.weight.shape)
    else:
        merged, _ = theirs.get_merged_weight(1.0)
    expected = layer.weight + METHODS[method].delta(adapter, layer)
    torch.testing.assert_close(merged.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, layer.weight)


BESIDE = [
    (method, kind, decomposed)
    for method in ("dora", "locon", "loha", "lokr")
    for kind in ("linear", "conv")
    for decomposed in (True, False)
    if METHODS[method].supports(LAYERS[kind]()) and (decomposed or method != "dora")
]


@pytest.mark.parametrize(("method", "kind", "decomposed"), BESIDE)
def test_a_changed_bias_beside_other_factors_is_added_to_the_bias(method: str, kind: str, decomposed: bool):
    """As ComfyUI does, and times the weight; what the factors do is LyCORIS' merge, above."""
    layer = LAYERS[kind]().requires_grad_(requires_grad=False)
    adapter = filled(METHODS[method], layer)
    if decomposed:
        adapter = replace(adapter, tensors={**adapter.tensors, "magnitude": torch.rand(len(layer.weight)) + 1})
    tensors, _ = KOHYA.dump(Adapter("x", {"unet": {"layer": adapter}}))
    bias = torch.randn(len(layer.weight))
    read = KOHYA.load({**tensors, "lora_unet_layer.diff_b": bias}, {})
    assert not read.unused
    share = read.layers["transformer"]["layer"]
    assert (share.method, METHODS[method].check(share, layer)) == (method, None)
    x = torch.randn(2, 5, 16) if kind == "linear" else torch.randn(2, 8, 6, 6)

    def at(adapter: LayerAdapter, weight: float, *, fused: bool = False) -> Tensor:
        slot = Slot(layer, [METHODS[method].part("a", adapter, layer)])
        slot.weigh({"a": weight})
        place(layer, slot)
        fusion = fuse({"layer": (layer, slot, {"a": adapter})}) if fused else None
        out = layer(x)
        if fusion:
            fusion.undo()
        take_off(layer)
        return out

    for weight in (1.0, -0.5):
        added = weight * bias.reshape(-1, *(1,) * (x.ndim - 2) if kind == "conv" else ())
        torch.testing.assert_close(at(share, weight), at(adapter, weight) + added, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(at(share, weight, fused=True), at(share, weight), rtol=1e-4, atol=1e-4)


PEFT_BIASED = ("lora_A.default.weight", "lora_B.default.weight", "lora_B.default.bias")


def test_peft_adds_the_bias_that_we_add(tmp_path: Path):
    layer = nn.Linear(8, 6).requires_grad_(requires_grad=False)
    model = get_peft_model(
        nn.Sequential(layer),
        LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["0"], init_lora_weights=False),
    )
    theirs = model.base_model.model[0]
    theirs.lora_B["default"].bias.data.normal_()
    tensors = {f"base_model.model.0.{name}": theirs.get_parameter(name).data for name in PEFT_BIASED}
    container.write(tmp_path / "a.safetensors", {k.replace(".default", ""): t for k, t in tensors.items()}, {})
    (adapter,) = load_adapter(tmp_path / "a.safetensors").layers["transformer"].values()
    assert (adapter.method, METHODS["biased"].check(adapter, layer)) == ("biased", None)
    x = torch.randn(5, 8)
    expected = theirs(x)
    place(layer, Slot(layer, [METHODS["biased"].part("a", replace(adapter, alpha=6.0), layer)]))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["diffusers", "torch", "layer"])
def test_plain_differences_of_a_norm_change_it(kind: str):
    norm = {"diffusers": lambda: RMSNorm(8, 1e-5), "torch": lambda: nn.RMSNorm(8), "layer": lambda: nn.LayerNorm(8)}[
        kind
    ]()
    norm.requires_grad_(requires_grad=False)
    model = nn.ModuleDict({"norm": norm})
    tensors = {"lora_unet_norm.diff": torch.randn(8)} | (
        {"lora_unet_norm.diff_b": torch.randn(8)} if kind == "layer" else {}
    )
    adapter = Adapter("a", KOHYA.load(tensors, {}).layers)
    found = fit(adapter, {"transformer": model})
    assert not found.unplaced
    (share,) = found.layers.values()
    x = torch.randn(3, 8)
    place(norm, Slot(norm, [METHODS["norm"].part("a", share, norm)]))
    ours = norm(x)
    take_off(norm)
    norm.weight.data += tensors["lora_unet_norm.diff"]
    if kind == "layer":
        norm.bias.data += tensors["lora_unet_norm.diff_b"]
    torch.testing.assert_close(ours, norm(x), rtol=1e-5, atol=1e-5)
