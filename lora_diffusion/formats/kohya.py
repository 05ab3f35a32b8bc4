"""The kohya spelling (sd-scripts, A1111, Civitai): flattened layer names, and an alpha tensor for every layer.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight      (rank, in[, kh, kw])   = down
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight        (out, rank[, 1, 1])    = up
    lora_unet_down_blocks_0_attentions_0_proj_in.alpha                 ()
    lora_te_…, or lora_te1_… and lora_te2_… where the base has two text encoders, lora_te3_… for T5

`lora_unet_` is the denoiser of any family; sd-scripts' OFT is under `oft_unet_`, for FLUX as lists, `.oft_blocks.0`,
`.1` and so on, one tensor for each part of a fused layer. A layer without alpha has alpha = its rank, never its
neighbour's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter, flat, same_layer
from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.formats import Parsed, check_components
from lora_diffusion.formats.assemble import assemble
from lora_diffusion.formats.embeddings import bundled
from lora_diffusion.formats.encoders import numbered_as
from lora_diffusion.formats.keys import is_language_model
from lora_diffusion.formats.provenance import family_for

_OFT = "oft_unet_"
_STARTS = (
    "lora_unet_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_te4_",
    "lora_prior_",
    "lora_transformer_",
    _OFT,
)
_PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    "text_encoder_4": "lora_te4_",
    "prior": "lora_prior_unet_",
    "text_conditioner": "lora_unet_llm_adapter_",
}
_PAIR = {"down": "lora_down.weight", "up": "lora_up.weight"}
_BESIDE = {"magnitude": "dora_scale", "diff_b": "diff_b"}
#: method -> tensor -> suffix
_SUFFIXES: dict[str, dict[str, str]] = {
    "lora": _PAIR,
    "biased": _PAIR | {"diff_b": "diff_b", "up_bias": "lora_B.bias"},
    "dora": _PAIR | _BESIDE,
    "locon": _PAIR | {"mid": "lora_mid.weight"} | _BESIDE,
    "loha": {part: f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")} | _BESIDE,
    "lokr": {part: f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")} | _BESIDE,
    "ia3": {"weight": "weight", "on_input": "on_input"},
    "oft": {
        "blocks": "oft_blocks",
        "diag": "oft_diag",
        "rescale": "rescale",
        "R": "oft_R.weight",
        "scaled": "oft_R.scaled_oft",
        **{f"blocks.{part}": f"oft_blocks.{part}" for part in range(4)},
    },
    "glora": {part: f"{part}.weight" for part in ("a1", "a2", "b1", "b2", "bm")},
    "tlora": {"down": "q_layer.weight", "sigma": "lambda_layer", "up": "p_layer.weight"},
    "vera": {"d": "vera_lambda_d", "b": "vera_lambda_b", "projection": "vera_projection"},
    "bottleneck": {
        "down": "adapter_down.weight",
        "down_bias": "adapter_down.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    },
    "prefix": {"k": "prefix_k", "v": "prefix_v"},
    "full": {"diff": "diff", "diff_b": "diff_b"},
    "norm": {"w_norm": "w_norm", "b_norm": "b_norm"},
    "set": {"value": "set_weight", "shape": "reshape_weight"},
}


class Kohya:
    """Reads and writes the files of sd-scripts and LyCORIS."""

    name = "kohya"
    writes = True

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether any tensor has a flattened prefix."""
        return any(key.startswith(_STARTS) for key in keys)

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """The neutral form, under flattened names that the live model resolves; `ss_network_alpha` never scales."""
        idle = _idle(tensors)
        parsed = assemble({key: tensor for key, tensor in tensors.items() if key not in idle} if idle else tensors)
        parsed.unused |= dict.fromkeys(sorted(idle), "sd-scripts holds an OFT with alpha 0 to no change at all")
        return parsed

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata. AdapterFileError for what has no kohya name: tokens, other components or methods."""
        who = f"adapter {adapter.name!r}"
        check_components(adapter, _PREFIXES, "kohya")
        first = "lora_prior_te_" if "prior" in adapter.layers else "lora_te_"
        prefixes = {**_PREFIXES, "text_encoder": first} if _has_one_encoder(adapter) else _PREFIXES
        prefixes = {component: prefixes[numbered_as(component, adapter)] for component in adapter.layers}
        tensors = bundled(adapter.embeddings, who)
        in_lists = any("blocks.0" in layer.tensors for *_, layer in adapter)
        for component, name, layer in adapter:
            path = prefixes[component] + _body(component, name)
            if in_lists and set(layer.tensors) == {"blocks"}:
                layer = replace(layer, tensors={"blocks.0": layer.tensors["blocks"]})
            if "blocks.0" in layer.tensors:
                path = f"{_OFT}{flat(name)}"
                if not layer.alpha:
                    raise AdapterFileError(
                        f"{who}: {name!r} has no bound; sd-scripts' OFT in parts does nothing without"
                    )
            if f"{path}.alpha" in tensors:
                raise AdapterFileError(f"{who}: two layers of {component} flatten to {path!r}; {name!r} is one")
            tensors |= layer_tensors(path, layer, who)
        return tensors, dict(adapter.metadata)


def _idle(tensors: Mapping[str, Tensor]) -> set[str]:
    """The tensors of sd-scripts' OFT layers whose alpha is 0."""
    ours = {key: key.partition(".")[0] for key in tensors if key.startswith(_OFT)}
    still = {path for key, path in ours.items() if key == f"{path}.alpha" and not tensors[key].any()}
    return {key for key, path in ours.items() if path in still}


def _has_one_encoder(adapter: Adapter) -> bool:
    """Whether the base has one text encoder, as far as the adapter tells: Stable Diffusion 1 and 2, language models."""
    if "text_encoder_2" not in adapter.layers and is_language_model(adapter.layers.get("text_encoder", ())):
        return True
    others = {"text_encoder_2", "text_encoder_3", "transformer"} & adapter.layers.keys()
    return not others and family_for(adapter).name != "Stable Diffusion XL"


def _body(component: str, name: str) -> str:
    if component.startswith("text_encoder") and same_layer(name).startswith("encoder_layers_"):
        return f"text_model_{same_layer(name)}"
    return flat(name)


def layer_tensors(path: str, layer: LayerAdapter, who: str) -> dict[str, Tensor]:
    """One layer under the LyCORIS suffixes. AdapterFileError for a method or tensor without one."""
    suffixes = _SUFFIXES.get(layer.method, {})
    unsayable = sorted(layer.tensors.keys() - suffixes.keys())
    if unsayable:
        raise AdapterFileError(f"{who}: {path}: the kohya spelling cannot say {some(unsayable)} of {layer.method}")
    tensors = {f"{path}.{suffixes[part]}": tensor for part, tensor in layer.tensors.items()}
    magnitude = layer.tensors.get("magnitude")
    if magnitude is not None and magnitude.ndim == 1:  # one for each output: (out, 1[, 1, 1]) here
        ones = layer.tensors["down"].ndim - 1 if "down" in layer.tensors else 1
        tensors[f"{path}.dora_scale"] = magnitude.reshape(-1, *(1,) * ones)
    if layer.alpha is not None:
        tensors[f"{path}.alpha"] = _alpha(layer.alpha)
    return tensors


def _alpha(alpha: float) -> Tensor:
    """As float32, which every tool writes, unless that would round it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


KOHYA = Kohya()
