"""An adapter's layers under the checkpoint's own names, as ComfyUI and sd-scripts want them.

Where the checkpoint fuses q, k and v, so does the adapter, exactly: parts that share `down` stack their `up`,
others become block-diagonal,

    down = [D_q; D_k; D_v]      up = diag(U_q, U_k, U_v)      alpha = scale · (r_q + r_k + r_v)

OFT of all parts becomes the list that sd-scripts has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.families.homes import homes
from lora_diffusion.families.names import Place, places
from lora_diffusion.families.naming import resolve
from lora_diffusion.families.splitting import swap_halves
from lora_diffusion.layers import out_width

#: levels above a language model's layers in transformers
_TOWER = re.compile(r"^(?:model\.|language_model\.)*(?=layers\.\d)")


def dotted(adapter: Adapter, models: Mapping[str, nn.Module]) -> Adapter:
    """The adapter under the names that Diffusers has. AdapterMismatchError where a layer finds no place."""
    layers: dict[str, dict[str, LayerAdapter]] = {}
    for component, home in homes(adapter.layers, models).items():
        if home not in models:
            raise AdapterMismatchError(f"adapter {adapter.name!r}: the base has no {component}")
        try:
            found = resolve(adapter.layers[component], models[home])
        except AdapterMismatchError as error:
            raise AdapterMismatchError(f"adapter {adapter.name!r}: {error}") from None
        if found.unmatched:
            model = type(models[home]).__name__
            raise AdapterMismatchError(f"adapter {adapter.name!r}: {found.unmatched[0]!r} is no layer of the {model}")
        layers[home] = found.layers
    return replace(adapter, layers=layers)


def named_for(adapter: Adapter, spelling: str, models: Mapping[str, nn.Module]) -> Adapter:
    """The adapter under the layer names that the tools know which read `spelling`; `models` as in `dotted`.

    ComfyUI's generic files have the checkpoint's own names, and so has sd-scripts, but for the U-Nets of Stable
    Diffusion 1 and 2, where it has Diffusers'. AdapterMismatchError where the checkpoint fuses layers and the
    adapter's method cannot be.
    """
    there = [models[component] for component in adapter.layers if component in models]
    if spelling not in ("kohya", "comfy"):
        return dotted(adapter, models)
    plain = spelling == "kohya" and not any(map(_has_own_names, there))
    named = dotted(adapter, models) if plain else original(adapter, models)
    return replace(named, layers=_with_encoders(named.layers, spelling))


def _with_encoders(layers: Mapping[str, dict[str, LayerAdapter]], spelling: str) -> dict[str, dict[str, LayerAdapter]]:
    """Language models below the one level that ComfyUI has above their layers, and sd-scripts has not; in ComfyUI's
    files the T5 that is a pipeline's only text encoder under the number that T5 has there: beside FLUX's layers the
    second, else the third."""
    level = "model." if spelling == "comfy" else ""
    found = {
        component: {_TOWER.sub(level, name): layer for name, layer in of.items()}
        if component.startswith("text_encoder")
        else of
        for component, of in layers.items()
    }
    only = found.keys() & {"text_encoder", "text_encoder_2", "text_encoder_3"} == {"text_encoder"}
    if spelling == "comfy" and only and all(name.startswith("encoder.block.") for name in found["text_encoder"]):
        like_flux = any(name.startswith(("double_blocks.", "single_blocks.")) for name in found.get("transformer", ()))
        found["text_encoder_2" if like_flux else "text_encoder_3"] = found.pop("text_encoder")
    return found


def _has_own_names(model: nn.Module) -> bool:
    """Whether sd-scripts knows this denoiser by its checkpoint's names: SDXL (conditioned on sizes), transformers."""
    if type(model).__name__ == "UNet2DConditionModel":
        return getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time"
    return bool(_places(model))


def original(adapter: Adapter, models: Mapping[str, nn.Module]) -> Adapter:
    """The adapter under the checkpoint's own names, in components that have such; `models` as in `dotted`."""
    adapter = dotted(adapter, models)
    layers = {component: _original(of, models[component]) for component, of in adapter.layers.items()}
    return replace(adapter, layers=layers)


def _original(layers: Mapping[str, LayerAdapter], model: nn.Module) -> dict[str, LayerAdapter]:
    live = dict(model.named_modules())
    table: dict[str, tuple[str, Place]] = {}
    for name, place in _places(model).items():
        for layer in place.layers:  # the widest name of a layer is the checkpoint's
            if layer not in table or len(place.layers) > len(table[layer][1].layers):
                table[layer] = (name, place)
    renamed: dict[str, LayerAdapter] = {}
    for name, layer in layers.items():
        if name not in table:
            renamed[name] = layer
        elif table[name][0] not in renamed:
            target, place = table[name]
            renamed[target] = _fused(target, place, layers, live)
    return renamed


def _places(model: nn.Module) -> dict[str, Place]:
    return places(type(model).__name__, dict(model.named_modules()))


def _fused(
    target: str, place: Place, layers: Mapping[str, LayerAdapter], live: Mapping[str, nn.Module]
) -> LayerAdapter:
    parts = [layers.get(name) for name in place.layers]
    there = [part for part in parts if part is not None]
    if place.swapped:
        return swap_halves(there[0], out_width(live[place.layers[0]]), target)
    if len(parts) == 1:
        return there[0]
    if len(there) == len(parts) and all(_is_plain_oft(there[0], part) for part in there):
        return replace(there[0], tensors={f"blocks.{i}": part.tensors["blocks"] for i, part in enumerate(there)})
    odd = [part.method for part in there if part.method != "lora" or set(part.tensors) != {"down", "up"}]
    if odd:
        raise AdapterMismatchError(f"layer {target!r}: the checkpoint fuses {len(parts)} layers, not {odd[0]}")
    down = there[0].tensors["down"]
    if len(there) == len(parts) and all(_same_down(there[0], part) for part in there):
        return replace(there[0], tensors={"down": down, "up": torch.cat([part.tensors["up"] for part in there])})
    return _block_diagonal(parts, [out_width(live[name]) for name in place.layers])


def _is_plain_oft(first: LayerAdapter, other: LayerAdapter) -> bool:
    """Whether sd-scripts could list it beside the first: one bound for all, as many blocks in every part."""
    shapes = [layer.tensors["blocks"].shape for layer in (first, other) if set(layer.tensors) == {"blocks"}]
    alike = len(shapes) == 2 and all(len(shape) == 3 for shape in shapes) and shapes[0][0] == shapes[1][0]
    return alike and (first.method, first.alpha) == ("oft", other.alpha)


def _same_down(first: LayerAdapter, other: LayerAdapter) -> bool:
    ours, theirs = first.tensors["down"], other.tensors["down"]
    return first.alpha == other.alpha and ours.shape == theirs.shape and torch.equal(ours, theirs)


def _block_diagonal(parts: list[LayerAdapter | None], widths: list[int]) -> LayerAdapter:
    there = [part for part in parts if part is not None]
    down = torch.cat([part.tensors["down"] for part in there])
    rank, scale = down.shape[0], _scale(there[0])
    rows: list[Tensor] = []
    column = 0
    for part, width in zip(parts, widths, strict=True):
        block = torch.zeros(width, rank, dtype=there[0].tensors["up"].dtype)
        if part is not None:
            up, factor = part.tensors["up"], _scale(part) / scale
            block[:, column : column + up.shape[1]] = up if factor == 1 else up * factor
            column += up.shape[1]
        rows.append(block)
    return LayerAdapter("lora", {"down": down, "up": torch.cat(rows)}, scale * rank, there[0].alpha_source)


def _scale(layer: LayerAdapter) -> float:
    rank = layer.tensors["down"].shape[0]
    return 1.0 if layer.alpha is None else layer.alpha / rank
