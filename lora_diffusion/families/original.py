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

from lora_diffusion.adapter import Adapter, LayerAdapter, same_layer
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.families.homes import homes
from lora_diffusion.families.names import EXCHANGED, Place, places
from lora_diffusion.families.naming import resolve
from lora_diffusion.families.splitting import swap_halves
from lora_diffusion.layers import out_width

#: levels above a language model's layers in transformers
_TOWER = re.compile(r"^(?:model\.|language_model\.)*(?=layers\.\d)")

#: methods of a pair, all whose tensors but `down` have one row an output; a magnitude for each input has not
_BY_ROW = ("lora", "biased", "dora")
_ROW = torch.zeros(1)


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
    return with_encoders(named, spelling)


def with_encoders(adapter: Adapter, spelling: str) -> Adapter:
    """The adapter with its text encoders as the tools of `spelling`, "kohya" or "comfy", know them; others as it is.

    Language models below the one level that ComfyUI has above their layers, and sd-scripts has not; in ComfyUI's
    files the T5 that is a pipeline's only text encoder under the number that T5 has there: beside FLUX's layers the
    second, else the third.
    """
    if spelling not in ("kohya", "comfy"):
        return adapter
    level = "model." if spelling == "comfy" else ""
    found = {
        component: {_TOWER.sub(level, name): layer for name, layer in of.items()}
        if component.startswith("text_encoder")
        else of
        for component, of in adapter.layers.items()
    }
    only = found.keys() & {"text_encoder", "text_encoder_2", "text_encoder_3"} == {"text_encoder"}
    if spelling == "comfy" and only and all(name.startswith("encoder.block.") for name in found["text_encoder"]):
        like_flux = any(name.startswith(("double_blocks.", "single_blocks.")) for name in found.get("transformer", ()))
        found["text_encoder_2" if like_flux else "text_encoder_3"] = found.pop("text_encoder")
    return replace(adapter, layers=found)


def _has_own_names(model: nn.Module) -> bool:
    """Whether sd-scripts knows this denoiser by its checkpoint's names: SDXL (conditioned on sizes), transformers."""
    if type(model).__name__ == "UNet2DConditionModel":
        return getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time"
    return bool(_places(model))


def original(adapter: Adapter, models: Mapping[str, nn.Module]) -> Adapter:
    """The adapter under the checkpoint's own names, in components that have such; `models` as in `dotted`.

    A layer that the file calls so already stays what it is, whatever its method.
    """
    layers: dict[str, dict[str, LayerAdapter]] = {}
    for component, home in homes(adapter.layers, models).items():
        kept = _kept(adapter.layers[component], models[home]) if home in models else {}
        others = {name: layer for name, layer in adapter.layers[component].items() if name not in kept}
        layers[home] = {name: adapter.layers[component][old] for old, name in kept.items()}
        for found in dotted(replace(adapter, layers={home: others}), models).layers.values() if others else ():
            renamed = _original(found, models[home])
            if twice := sorted(renamed.keys() & layers[home].keys()):
                raise AdapterMismatchError(f"adapter {adapter.name!r}: {twice[0]!r} stands there whole and in parts")
            layers[home] |= renamed
    return replace(adapter, layers=layers)


def _kept(layers: Mapping[str, LayerAdapter], model: nn.Module) -> dict[str, str]:
    """Names of the file -> the checkpoint's dotted name that they are, where they can be nothing else."""
    if type(model).__name__ in EXCHANGED:
        return {}
    live = {same_layer(name) for name, _ in model.named_modules()}
    names = {same_layer(name): name for name in {name for name, _ in _widest(model).values()}}
    return {name: names[flat] for name in layers if (flat := same_layer(name)) in names and flat not in live}


def _widest(model: nn.Module) -> dict[str, tuple[str, Place]]:
    """Layer -> the widest of its original names, which is the checkpoint's, and what that means."""
    table: dict[str, tuple[str, Place]] = {}
    for name, place in _places(model).items():
        for layer in place.layers:
            if layer not in table or len(place.layers) > len(table[layer][1].layers):
                table[layer] = (name, place)
    return table


def _original(layers: Mapping[str, LayerAdapter], model: nn.Module) -> dict[str, LayerAdapter]:
    live, table = dict(model.named_modules()), _widest(model)
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
    if len(there) == len(parts) and all(_same_down(there[0], part) for part in there):
        rows = {key: torch.cat([part.tensors[key] for part in there]) for key in there[0].tensors if key != "down"}
        return replace(there[0], tensors={"down": there[0].tensors["down"], **rows})
    odd = [part.method for part in there if part.method != "lora" or set(part.tensors) != {"down", "up"}]
    if odd:
        raise AdapterMismatchError(f"layer {target!r}: the checkpoint fuses {len(parts)} layers, not {odd[0]}")
    return _block_diagonal(parts, [out_width(live[name]) for name in place.layers])


def _is_plain_oft(first: LayerAdapter, other: LayerAdapter) -> bool:
    """Whether sd-scripts could list it beside the first: one bound for all, as many blocks in every part."""
    shapes = [layer.tensors["blocks"].shape for layer in (first, other) if set(layer.tensors) == {"blocks"}]
    alike = len(shapes) == 2 and all(len(shape) == 3 for shape in shapes) and shapes[0][0] == shapes[1][0]
    return alike and (first.method, first.alpha) == ("oft", other.alpha)


def _same_down(first: LayerAdapter, other: LayerAdapter) -> bool:
    """Whether both are pairs, of one method, whose rows could follow each other behind one `down`."""
    if first.method not in _BY_ROW or (first.method, first.alpha) != (other.method, other.alpha):
        return False
    if first.tensors.keys() != other.tensors.keys() or first.tensors.get("magnitude", _ROW).ndim > 1:
        return False
    ours, theirs = first.tensors["down"], other.tensors["down"]
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


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
