"""The key lists of real files: every tensor read, every layer found on the real-size model, every shape right."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_diffusion.families.naming import resolve
from lora_diffusion.formats import FORMATS, Parsed
from lora_diffusion.methods.lora import LoRA

DATA = Path(__file__).parents[1] / "data"
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@cache
def model(kind: str) -> nn.Module:
    """A real-size model without memory."""
    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    clip_g = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
    with torch.device("meta"):
        return {
            "sd1": lambda: UNet2DConditionModel(cross_attention_dim=768),
            "sdxl": lambda: UNet2DConditionModel(**SDXL),
            "flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
            "qwen": lambda: QwenImageTransformer2DModel(num_layers=2),
            "clip_l": lambda: CLIPTextModel(clip_l),
            "clip_g": lambda: CLIPTextModelWithProjection(clip_g),
        }[kind]()


@cache
def key_lists() -> dict[str, dict[str, list[int]]]:
    return json.loads(gzip.decompress((DATA / "keys.json.gz").read_bytes()))


def parsed(name: str) -> Parsed:
    """A key list, read as a file of it would be (tensors on the meta device, alphas 0.5)."""
    tensors: dict[str, Tensor] = {
        key: torch.tensor(0.5) if not shape else torch.empty(shape, device="meta")
        for key, shape in key_lists()[name].items()
    }
    reader = next(spelling for spelling in FORMATS.values() if spelling.recognises(tensors, {}))
    return reader.load(tensors, {})


CASES: dict[str, tuple[dict[str, str], dict[str, int]]] = {
    "sd15_kohya": ({"unet": "sd1", "text_encoder": "clip_l"}, {"unet": 192, "text_encoder": 72}),
    "sdxl_kohya": (
        {"unet": "sdxl", "text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        {"unet": 722, "text_encoder": 72, "text_encoder_2": 192},
    ),
    "flux_lora_kohya": ({"transformer": "flux"}, {"transformer": 19 * 14 + 38 * 6}),
    "flux_lora_diffusers": ({"transformer": "flux"}, {"transformer": 494}),
    "flux_lora_diffusers_no_proj_mlp": ({"transformer": "flux"}, {"transformer": 342}),
    "flux_lora_diffusers_base_model": ({"transformer": "flux"}, {"transformer": 381}),
    "flux_lora_xlabs": ({"transformer": "flux"}, {"transformer": 24}),
    "qwen_image_lora_diffusers": ({"transformer": "qwen"}, {"transformer": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_a_real_key_list_lands_on_a_layer_that_it_fits(name: str):
    models, counts = CASES[name]
    read = parsed(name)
    assert not read.unused
    assert read.layers.keys() == models.keys()
    for component, layers in read.layers.items():
        live = model(models[component])
        found = resolve(layers, live)
        assert not found.unmatched
        assert len(found.layers) == counts[component]
        for path, layer in found.layers.items():
            assert LoRA.check(layer, live.get_submodule(path)) is None, path


@pytest.mark.parametrize(
    "name", ["qwen_image_lora_kohya", "anima_lora_kohya_with_te", "anima_lora_peft", "flux_lokr_bfl"]
)
def test_every_tensor_of_the_other_lists_is_read(name: str):
    read = parsed(name)
    assert not read.unused
    assert "transformer" in read.layers


def test_a_control_lora_is_read_with_its_biases_and_norms():
    layers = parsed("flux_control_lora").layers["transformer"]
    assert {layer.method for layer in layers.values()} == {"biased", "set"}
    assert layers["img_in"].tensors.keys() == {"down", "up", "up_bias"}
