"""Files that we write, in stock pipelines, and files that Diffusers writes, in ours: the same latents come out.

Diffusers' own loader is the peer where it reads a spelling whole. Where it does not, its checkpoint converters are:
the file's deltas, by kohya's rule alpha / rank · up · down, go through them like weights and are added to the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils as convert
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_diffusion import Adapter, AdapterStack, load_adapter, save_adapter
from lora_diffusion.adapter import flat, same_layer
from lora_diffusion.cli.convert import convert as convert_file
from lora_diffusion.families.original import named_for
from lora_diffusion.layers import is_convolution, is_linear
from tests import tiny
from tests.families.test_names import Checkpoint
from tests.formats import random_adapters, test_round_trips
from tests.formats.test_peers import quiet

WEIGHT = 0.7


def sd2_of_real_width() -> StableDiffusionPipeline:
    """Stable Diffusion 2 with an encoder as wide as OpenCLIP's ViT-H, by which its files are known."""
    pipe = tiny.sd(cross_attention_dim=1024, use_linear_projection=True)
    torch.manual_seed(3)
    config = {**pipe.text_encoder.config.to_dict(), "hidden_size": 1024, "num_attention_heads": 2}
    pipe.register_modules(text_encoder=CLIPTextModel(CLIPTextConfig(**config)))
    return pipe


BUILD = {name: test_round_trips.BUILD[name] for name in ("sd", "sd, 2.x", "sdxl", "sd3", "flux")}
WIDE = {**BUILD, "sd, 2.x, wide": sd2_of_real_width}
#: the text encoders that Diffusers' loader takes adapters of
CLIPS = {
    "sd": ["text_encoder"],
    "sd, 2.x": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "sd3": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder"],
}
LOADED = [
    *((family, "diffusers") for family in BUILD),
    *((family, "kohya") for family in BUILD if family != "sd3"),
    ("flux", "comfy"),
]


def denoiser_of(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def latents(pipe: Any) -> Tensor:
    return torch.as_tensor(tiny.picture(pipe, output_type="latent"))


def assert_drawn_alike(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(10.0, theirs.abs().max().item()))
    assert (theirs - base).abs().max() > 0.01


def over(pipe: Any, components: list[str], alpha: float | None = None) -> Adapter:
    """Every layer of the denoiser and `components` that takes a pair; ranks differ, and alphas but for `alpha`."""
    torch.manual_seed(5)
    adapter = quiet(random_adapters.over(pipe, denoiser_of(pipe), *components), alpha=alpha)
    for component, layers in adapter.layers.items():
        live = dict(getattr(pipe, component).named_modules())
        paired = {n: layer for n, layer in layers.items() if is_linear(live[n]) or is_convolution(live[n])}
        adapter.layers[component] = {n: layer for n, layer in paired.items() if "embed_tokens" not in n}
    return adapter


def known_to_diffusers(family: str, spelling: str, adapter: Adapter) -> Adapter:
    """Without what its loader refuses or drops: projections of CLIP; of FLUX by kohya's names, the layers outside the
    blocks, and `linear1`, for which it has the width 3,072 built in."""
    layers = {c: dict(of) for c, of in adapter.layers.items()}
    for component in CLIPS[family]:
        layers[component] = {n: of for n, of in layers[component].items() if "self_attn" in n or "mlp" in n}
    if family == "flux" and spelling != "diffusers":
        blocks = {n: of for n, of in layers["transformer"].items() if "transformer_blocks." in n}
        one = "single_transformer_blocks."
        layers["transformer"] = {
            n: of for n, of in blocks.items() if not (n.startswith(one) and ("attn.to_" in n or "proj_mlp" in n))
        }
    return replace(adapter, layers=layers)


@pytest.mark.parametrize(("family", "spelling"), LOADED)
def test_a_stock_pipeline_draws_with_our_file_what_we_draw(family: str, spelling: str, tmp_path: Path):
    ours, theirs = BUILD[family](), BUILD[family]()
    base = latents(ours)
    alpha = None if spelling == "diffusers" or family == "flux" else 3.0  # Diffusers 0.42 mixes up alphas that differ
    adapter = known_to_diffusers(family, spelling, over(ours, CLIPS[family], alpha))
    adapter = named_for(adapter, spelling, ours.components)
    path = save_adapter(adapter, tmp_path / "a.safetensors", format=spelling)
    theirs.load_lora_weights(str(path), adapter_name="a")
    theirs.set_adapters(["a"], [WEIGHT])
    AdapterStack(ours).add(path, WEIGHT)
    assert_drawn_alike(latents(ours), latents(theirs), base)


#: prefix of sd-scripts or ComfyUI -> component, by family; what they call each text encoder
ENCODERS: dict[tuple[str, str], dict[str, str]] = {
    ("sd", "kohya"): {"lora_te_": "text_encoder"},
    ("sd, 2.x", "kohya"): {"lora_te_": "text_encoder"},
    ("sdxl", "kohya"): {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"},
    ("sd3", "kohya"): {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"},
    ("flux", "kohya"): {"lora_te1_": "text_encoder", "lora_te3_": "text_encoder_2"},
    ("sd", "comfy"): {"clip_l": "text_encoder"},
    ("sd, 2.x, wide", "comfy"): {"clip_h": "text_encoder"},
    ("sdxl", "comfy"): {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    ("sd3", "comfy"): {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    ("flux", "comfy"): {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
}
#: families whose U-Net sd-scripts calls by Diffusers' names
PLAIN = (("sd", "kohya"), ("sd, 2.x", "kohya"))


def deltas_in(path: Path) -> dict[str, Tensor]:
    """Name before the suffix -> delta, straight from the file by kohya's rule."""
    tensors = load_file(path)
    found: dict[str, Tensor] = {}
    for key, down in tensors.items():
        stem = key.removesuffix(".lora_down.weight")
        if stem != key:
            up, scale = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.alpha"].item() / len(down)
            found[stem] = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:]) * scale
    assert 3 * len(found) == len(tensors)
    return found


def converted(family: str, deltas: dict[str, Tensor], pipe: Any) -> dict[str, Tensor]:
    """What Diffusers' checkpoint converter makes of deltas under the checkpoint's dotted names."""
    weights = {f"{name}.weight": delta for name, delta in deltas.items()}
    if family == "sd3":
        return convert.convert_sd3_transformer_checkpoint_to_diffusers(Checkpoint(weights))
    if family == "flux":
        return narrow(convert.convert_flux_transformer_checkpoint_to_diffusers(Checkpoint(widened(weights))), pipe)
    biases = {key.replace(".weight", ".bias"): torch.zeros(1) for key in weights}
    checkpoint = {f"model.diffusion_model.{key}": tensor for key, tensor in (weights | biases).items()}
    return convert.convert_ldm_unet_checkpoint(checkpoint, pipe.unet.config)


def widened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of `linear1` where the converter looks for those of a FLUX that is 3,072 wide."""
    wide = dict(weights)
    for key in weights:
        if "linear1" in key:
            parts = weights[key].split((tiny.WIDTH, tiny.WIDTH, tiny.WIDTH, 4 * tiny.WIDTH))
            wide[key] = torch.cat([nn.functional.pad(p, (0, 0, 0, 96 * len(p) - len(p))) for p in parts])
    return wide


def narrow(weights: Mapping[str, Tensor], pipe: Any) -> dict[str, Tensor]:
    shapes = {name: tensor.shape for name, tensor in pipe.transformer.state_dict().items()}
    return {key: tensor[: shapes[key][0]] for key, tensor in weights.items() if key in shapes}


def add(model: nn.Module, deltas: Mapping[str, Tensor]) -> None:
    for name, delta in deltas.items():
        weight = model.get_parameter(f"{name}.weight")
        weight.data += WEIGHT * delta.reshape(weight.shape)


@pytest.mark.parametrize(("family", "spelling"), ENCODERS)
def test_a_model_with_the_deltas_of_our_file_draws_what_we_draw(family: str, spelling: str, tmp_path: Path):
    ours, theirs = WIDE[family](), WIDE[family]()
    base, encoders = latents(ours), ENCODERS[family, spelling]
    adapter = over(ours, list(encoders.values()))
    named = named_for(adapter, spelling, ours.components)
    path = save_adapter(named, tmp_path / "a.safetensors", format=spelling)
    AdapterStack(ours).add(path, WEIGHT)

    deltas = deltas_in(path)
    for name, component in encoders.items():
        prefix = name if spelling == "kohya" else f"text_encoders.{name}.transformer."
        mine = {key.removeprefix(prefix): deltas.pop(key) for key in list(deltas) if key.startswith(prefix)}
        assert len(mine) == len(adapter.layers[component])
        same = {same_layer(layer): layer for layer in adapter.layers[component]}
        add(getattr(theirs, component), {same[same_layer(name)]: delta for name, delta in mine.items()})
    denoiser = denoiser_of(theirs)
    prefix = "lora_unet_" if spelling == "kohya" else "diffusion_model."
    names = {flat(name): name for name in named.layers[denoiser]}
    dotted = {names[flat(key.removeprefix(prefix))]: delta for key, delta in deltas.items()}
    if (family, spelling) in PLAIN:
        add(theirs.unet, dotted)
    else:
        found = converted(family, dotted, theirs)
        assert {f"{name}.weight" for name in adapter.layers[denoiser]} <= found.keys()
        add(getattr(theirs, denoiser), {n: found[f"{n}.weight"] for n in adapter.layers[denoiser]})
    assert_drawn_alike(latents(ours), latents(theirs), base)


def train_like_diffusers(pipe: Any, component: str, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random PEFT weights on a component: what Diffusers' scripts hand to `save_lora_weights`."""
    clip = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    targets = clip if "text" in component else ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    model = getattr(pipe, component)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(0.3)
    return get_peft_model_state_dict(model), config.to_dict()


@pytest.mark.parametrize("described", [True, False], ids=["with its scales", "without"])
@pytest.mark.parametrize("family", BUILD)
def test_we_draw_with_a_file_of_diffusers_what_it_draws(family: str, described: bool, tmp_path: Path):
    torch.manual_seed(6)
    maker, ours, theirs = BUILD[family](), BUILD[family](), BUILD[family]()
    base, saved = latents(ours), {}
    for component, settings in [
        (denoiser_of(maker), {"lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"to_k": 7}}),
        *((clip, {"lora_alpha": 6, "rank_pattern": {"fc1": 2}}) for clip in CLIPS[family]),
    ]:
        weights, config = train_like_diffusers(maker, component, **settings)
        saved[f"{component}_lora_layers"] = weights
        if described:
            saved[f"{component}_lora_adapter_metadata"] = config
    type(maker).save_lora_weights(tmp_path, **saved)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    theirs.load_lora_weights(str(path), adapter_name="a")
    theirs.set_adapters(["a"], [WEIGHT])
    AdapterStack(ours).add(path, WEIGHT)
    assert {layer.alpha_source for *_, layer in load_adapter(path)} == {"metadata" if described else "assumed"}
    assert_drawn_alike(latents(ours), latents(theirs), base)


def test_we_draw_with_what_diffusers_turned_into_kohyas_spelling_what_it_draws(tmp_path: Path):
    torch.manual_seed(7)
    maker, ours, theirs = tiny.sd(), tiny.sd(), tiny.sd()
    base, tensors = latents(ours), {}
    for component in ("unet", "text_encoder"):
        weights, _ = train_like_diffusers(maker, component, lora_alpha=4)
        level = "text_model." if component == "text_encoder" else ""
        tensors |= {f"{component}.{level}{name}": tensor for name, tensor in weights.items()}
    save_file(convert_state_dict_to_kohya(tensors), tmp_path / "a.safetensors")
    theirs.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="a")
    theirs.set_adapters(["a"], [WEIGHT])
    AdapterStack(ours).add(tmp_path / "a.safetensors", WEIGHT)
    assert_drawn_alike(latents(ours), latents(theirs), base)


@pytest.mark.parametrize("style", ["ink", "clay"])
def test_a_style_of_the_samples_turned_into_kohyas_spelling_draws_the_same_elsewhere(style: str, tmp_path: Path):
    samples = Path(__file__).parents[2] / "samples"
    ours, theirs = (StableDiffusionPipeline.from_pretrained(samples / "base") for _ in range(2))
    base, path = latents(ours), tmp_path / "a.safetensors"
    convert_file(samples / "adapters" / f"{style}.safetensors", path, "kohya", base=str(samples / "base"))
    theirs.load_lora_weights(str(path), adapter_name="a")
    theirs.set_adapters(["a"], [WEIGHT])
    AdapterStack(ours).add(samples / "adapters" / f"{style}.safetensors", WEIGHT)
    assert_drawn_alike(latents(ours), latents(theirs), base)
