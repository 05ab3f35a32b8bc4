"""The kohya spelling: real key lists, per-module alpha, component prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from lora_diffusion import Adapter, AdapterFileError, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.families.naming import resolve
from lora_diffusion.formats.comfy import COMFY
from lora_diffusion.formats.kohya import KOHYA
from tests.formats import random_adapters


def triple(path: str, rank: int = 2, alpha: float | None = None) -> dict[str, torch.Tensor]:
    tensors = {f"{path}.lora_down.weight": torch.randn(rank, 8), f"{path}.lora_up.weight": torch.randn(8, rank)}
    return tensors if alpha is None else tensors | {f"{path}.alpha": torch.tensor(alpha)}


def test_every_layer_keeps_its_own_alpha():
    tensors = triple("lora_unet_mid_block_attentions_0_proj_in", 4, 1.0)
    tensors |= triple("lora_unet_mid_block_attentions_0_proj_out", 4, 32.0)
    tensors |= triple("lora_te_text_model_encoder_layers_0_mlp_fc1", 8)
    layers = KOHYA.load(tensors, {"ss_network_alpha": "77"}).layers
    unet = layers["unet"]
    assert unet["mid_block_attentions_0_proj_in"].alpha == 1
    assert unet["mid_block_attentions_0_proj_out"].alpha == 32
    missing = layers["text_encoder"]["text_model_encoder_layers_0_mlp_fc1"]
    assert (missing.alpha, missing.alpha_source) == (8, "assumed")


def test_written_and_read_again_it_is_the_same_and_lands_on_the_same_layers(
    sdxl: StableDiffusionXLPipeline, tmp_path: Path
):
    adapter = random_adapters.over(sdxl, "unet", "text_encoder", "text_encoder_2")
    again = load_adapter(save_adapter(adapter, tmp_path / "a.safetensors", format="kohya"))
    assert again == adapter
    assert again.content_hash == adapter.content_hash
    for component, layers in adapter.layers.items():
        found = resolve(again.layers[component], getattr(sdxl, component))
        assert found.layers == layers
        assert not found.unmatched


def test_diffusers_reads_a_uniform_alpha_as_we_do(sd: StableDiffusionPipeline, tmp_path: Path):
    adapter = random_adapters.over(sd, "unet", "text_encoder")
    for component, layers in adapter.layers.items():  # Diffusers 0.42 mixes up alphas that differ
        for name, layer in layers.items():
            layers[name] = LayerAdapter("lora", layer.tensors, 3.0)
        adapter.layers[component] = layers
    sd.load_lora_weights(str(save_adapter(adapter, tmp_path / "a.safetensors", format="kohya")), adapter_name="a")
    random_adapters.assert_loaded_by_diffusers(sd, adapter, "a")


def test_lora_unet_of_a_transformer_is_the_transformer(flux: FluxPipeline):
    tensors, _ = KOHYA.dump(random_adapters.over(flux, "transformer", "text_encoder"))
    assert {key.partition("_blocks")[0] for key in tensors if "single" in key} == {"lora_unet_single_transformer"}
    assert KOHYA.load(tensors, {}).layers.keys() == {"transformer", "text_encoder"}


def test_one_text_encoder_is_te_and_two_are_te1_and_te2(sdxl: StableDiffusionXLPipeline):
    one, _ = KOHYA.dump(random_adapters.over(sdxl, "text_encoder"))
    two, _ = KOHYA.dump(random_adapters.over(sdxl, "text_encoder", "text_encoder_2"))
    assert all(key.startswith("lora_te_text_model_encoder_layers_") for key in one)
    assert {key[:9] for key in two} == {"lora_te1_", "lora_te2_"}


def test_a_base_with_several_text_encoders_has_te1_even_where_the_others_are_not_adapted(
    sdxl: StableDiffusionXLPipeline, flux: FluxPipeline
):
    for pipe, denoiser in ((sdxl, "unet"), (flux, "transformer")):
        adapter = random_adapters.over(pipe, denoiser, "text_encoder")
        tensors, _ = KOHYA.dump(adapter)
        assert {key.partition("text_model")[0] for key in tensors if "text_model" in key} == {"lora_te1_"}
        assert Adapter("again", KOHYA.load(tensors, {}).layers) == adapter


@pytest.mark.parametrize(("spelling", "prefix"), [(KOHYA, "lora_te3_"), (COMFY, "text_encoders.t5xxl.transformer.")])
def test_the_t5_of_flux_is_called_as_sd_scripts_and_comfyui_call_it(spelling, prefix: str, flux: FluxPipeline):
    adapter = random_adapters.over(flux, "transformer", "text_encoder_2")
    tensors, _ = spelling.dump(adapter)
    assert any(key.startswith(prefix) for key in tensors)
    assert not any(key.startswith(("lora_te2_", "text_encoders.clip_g.")) for key in tensors)
    assert Adapter("again", spelling.load(tensors, {}).layers) == adapter


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite_is_an_error(alpha, tmp_path: Path):
    from safetensors.torch import save_file

    save_file(triple("lora_unet_mid_block_attentions_0_proj_in", 2, alpha), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="finite"):
        load_adapter(tmp_path / "a.safetensors")
    assert "finite" in str(load_adapter(tmp_path / "a.safetensors", strict=False).unused)


def test_two_layers_that_flatten_alike_are_refused():
    layer = LayerAdapter("lora", {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}, 1.0)
    with pytest.raises(AdapterFileError, match="two layers"):
        KOHYA.dump(Adapter("x", {"unet": {"a.b_c": layer, "a_b.c": layer}}))


def test_an_alpha_without_exact_float32_survives():
    layer = LayerAdapter("lora", {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}, 32 / 3)
    adapter = Adapter("x", {"unet": {"down_blocks.0.q": layer}})
    tensors, metadata = KOHYA.dump(adapter)
    assert Adapter("y", KOHYA.load(tensors, metadata).layers) == adapter
