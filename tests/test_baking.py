"""Baking into 4 bits: what is measured is written, small deltas are refused, untouched layers keep their bytes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_diffusion import Adapter, save_adapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.merging import bake
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.quantize import dequantize, is_quantized, load_quantized, quantize, save_quantized
from lora_diffusion.quantize.layers import is_four_bit
from lora_diffusion.targets import find_targets
from tests import tiny, tiny_families
from tests.test_gates import adapter
from tests.test_generating import run

baking = import_module("lora_diffusion.merging.bake")  # the package calls its function so


@pytest.fixture
def base(sd: Any, tmp_path: Path) -> Path:
    sd.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def small_base(sd: Any, base: Path, tmp_path: Path) -> Path:
    """The same with its denoiser in NF4."""
    return bake(base, [(adapter(sd, components=("unet",)), 0.0)], tmp_path / "nf4", precision="nf4").folder


def of_relative_norm(unet: Any, size: float, names: str = "attention") -> Adapter:
    """Random pairs of rank 2 with |D| = size · |W| on every layer."""
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for name, layer in find_targets(unet, names).items():
        layers[name] = LoRA(2).fresh(layer, generator)
        up, down = layers[name].tensors["up"].normal_(generator=generator), layers[name].tensors["down"]
        up.mul_(size * dequantize(layer).norm() / (up @ down).norm())
    return Adapter("d", {"unet": layers})


def delta_of(one: Adapter, name: str) -> torch.Tensor:
    layer = one.layers["unet"][name]
    return layer.tensors["up"] @ layer.tensors["down"]


def test_a_share_near_one_does_not_hide_a_delta_lost_in_noise(sd: Any, base: Path, tmp_path: Path) -> None:
    one = of_relative_norm(sd.unet, 0.01)
    with pytest.raises(ConfigError, match=r"of the delta at a cosine of 0\.[0-4]\d to it would survive in nf4"):
        bake(base, [(one, 1.0)], tmp_path / "baked", precision="nf4")
    assert not (tmp_path / "baked").exists()
    left = bake(base, [(one, 1.0)], tmp_path / "baked", precision="nf4", force=True).survival
    changes, deltas = [], []
    for name in one.layers["unet"]:
        weight, delta = sd.unet.get_submodule(name).weight.detach(), delta_of(one, name)
        changes.append((_through_nf4(weight + delta) - _through_nf4(weight)).double().flatten())
        deltas.append(delta.double().flatten())
    change, delta = torch.cat(changes), torch.cat(deltas)
    assert left.share == pytest.approx(float(change @ delta / (delta @ delta)), abs=1e-3)
    assert left.cosine == pytest.approx(float(change @ delta / change.norm() / delta.norm()), abs=1e-3)
    assert left.least == left.cosine < 0.5


def _through_nf4(weight: torch.Tensor) -> torch.Tensor:
    functional: Any = vars(bitsandbytes)["functional"]
    payload, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(payload, state)


def test_what_survives_is_what_the_folder_has(sd: Any, base: Path, tmp_path: Path) -> None:
    one = of_relative_norm(sd.unet, 2.0)
    baked = bake(base, [(one, 1.0)], tmp_path / "large", precision="nf4")
    assert baked.kept >= 0.9
    unet = tiny.unet()
    load_quantized(unet, baked.folder / "unet")
    for name in one.layers["unet"]:
        wanted = sd.unet.get_submodule(name).weight + delta_of(one, name)
        expected = _through_nf4(wanted.bfloat16().float())
        given = dequantize(unet.get_submodule(name))
        assert float((given - expected).norm() / expected.norm()) < 0.03


def test_a_base_in_four_bits_is_measured_and_only_what_is_baked_changes(
    sd: Any, small_base: Path, tmp_path: Path
) -> None:
    before = load_file(small_base / "unet" / "quantized.safetensors")
    faint = of_relative_norm(load_pipeline(small_base, device="cpu").pipe.unet, 0.01)
    with pytest.raises(ConfigError, match="would survive in nf4, expected at least"):
        bake(small_base, [(faint, 1.0)], tmp_path / "no")
    assert not (tmp_path / "no").exists()
    strong = of_relative_norm(sd.unet, 2.0)
    baked = bake(small_base, [(strong, 1.0)], tmp_path / "yes")
    assert (baked.precision, baked.kept >= 0.9) == ("nf4", True)
    after = load_file(baked.folder / "unet" / "quantized.safetensors")
    touched = tuple(f"{name}." for name in strong.layers["unet"])
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same or name.startswith(touched), name
        assert not same or not name.startswith(touched) or not name.endswith(".weight"), name
    assert any(is_quantized(layer) for layer in load_pipeline(baked.folder, device="cpu").pipe.unet.modules())


@pytest.mark.parametrize("into", ["fp32", "bf16"])
def test_a_base_in_four_bits_is_baked_into_a_dense_folder(small_base: Path, tmp_path: Path, into: Any) -> None:
    four = load_pipeline(small_base, device="cpu").pipe.unet
    faint = of_relative_norm(four, 0.01)
    baked = bake(small_base, [(faint, 1.0)], tmp_path / "dense", precision=into)
    dense = load_pipeline(baked.folder, precision="fp32", device="cpu").pipe.unet
    for name in faint.layers["unet"]:
        wanted = dequantize(four.get_submodule(name)) + delta_of(faint, name)
        tolerance = 1e-6 if into == "fp32" else 2**-8
        torch.testing.assert_close(dense.get_submodule(name).weight, wanted, rtol=tolerance, atol=1e-6)


def test_a_base_in_eight_bits_is_baked_where_a_precision_is_named(sd: Any, base: Path, tmp_path: Path) -> None:
    quantize(sd.unet, "int8", compute_dtype=torch.float32)
    save_quantized(sd.unet, base / "unet")
    for dense in (base / "unet").glob("diffusion_pytorch_model*"):
        dense.unlink()
    one = of_relative_norm(sd.unet, 0.1)
    with pytest.raises(ConfigError, match="is in int8, which is not written; say a precision"):
        bake(base, [(one, 1.0)], tmp_path / "baked")
    baked = bake(base, [(one, 1.0)], tmp_path / "baked", precision="fp32")
    dense = load_pipeline(baked.folder, precision="fp32", device="cpu").pipe.unet
    name = next(iter(one.layers["unet"]))
    wanted = dequantize(sd.unet.get_submodule(name)) + delta_of(one, name)
    torch.testing.assert_close(dense.get_submodule(name).weight, wanted, rtol=1e-5, atol=1e-6)

    faint = of_relative_norm(sd.unet, 0.01)
    with pytest.raises(ConfigError, match="would survive in nf4, expected at least"):
        bake(base, [(faint, 1.0)], tmp_path / "four", precision="nf4")
    assert bake(base, [(faint, 1.0)], tmp_path / "four", precision="nf4", force=True).survival.cosine < 0.5
    four = load_pipeline(tmp_path / "four", precision="nf4", device="cpu").pipe.unet
    small = [layer for layer in four.modules() if is_quantized(layer)]
    assert small
    assert all(map(is_four_bit, small))


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O"), KeyboardInterrupt()])
def test_a_bake_that_breaks_off_leaves_nothing(
    sd: Any, base: Path, tmp_path: Path, precision: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = of_relative_norm(sd.unet, 2.0)
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patched:

        def full(*_: object, **__: object) -> None:
            raise error

        patched.setattr(type(sd.vae), "save_pretrained", full)  # when the text encoder is there already
        patched.setattr(baking, "save_quantized", full)
        for name in ("new", "empty"):
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ConfigError):
                bake(base, [(one, 1.0)], tmp_path / name, precision=precision)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "empty"]
    assert not list((tmp_path / "empty").iterdir())
    assert bake(base, [(one, 1.0)], tmp_path / "empty", precision=precision).folder == tmp_path / "empty"
    assert load_pipeline(tmp_path / "empty", precision=precision, device="cpu").pipe.unet is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "empty"]


def test_a_family_s_own_layers_stay_in_sixteen_bits(tmp_path: Path) -> None:
    pipe = tiny_families.flux2()
    pipe.save_pretrained(tmp_path / "base")
    one = adapter(pipe, components=("transformer",))
    baked = bake(tmp_path / "base", [(one, 1.0)], tmp_path / "baked", precision="nf4", force=True)
    fresh = load_pipeline(tmp_path / "base", precision="nf4", device="cpu").pipe.transformer
    again = load_pipeline(baked.folder, precision="nf4", device="cpu").pipe.transformer
    small = [{name for name, layer in model.named_modules() if is_quantized(layer)} for model in (fresh, again)]
    assert small[0] == small[1]
    assert not [name for name in small[1] if "stream_modulation" in name]


def test_the_terminal_says_what_survives(sd: Any, small_base: Path, tmp_path: Path) -> None:
    save_adapter(of_relative_norm(sd.unet, 0.01), tmp_path / "d.safetensors")
    bake_it = ("bake", tmp_path / "d.safetensors", "-b", small_base, "-o", tmp_path / "out")
    assert "cosine" in run(*bake_it, fails=ConfigError)
    assert "of the delta at a cosine of 0." in run(*bake_it, "--force")
