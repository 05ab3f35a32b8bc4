"""Metadata for the files we write: the keys that other tools show, and those that would lie in the new file."""

from __future__ import annotations

from collections.abc import Mapping

from lora_diffusion import __version__
from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.formats.identity import Family, Named, family_of
from lora_diffusion.formats.peft_config import METADATA_KEY, SIDECAR_KEY

#: keys that speak of the spelling or bytes of the file they stood in
_OF_THE_FILE = (METADATA_KEY, SIDECAR_KEY, "format", "sshs_model_hash", "sshs_legacy_hash", "unet", "text_encoder")
_KOHYA_MODULES = {"Stable Diffusion 3": "networks.lora_sd3", "FLUX.1": "networks.lora_flux"}
_KOHYA_BASES = {
    "Stable Diffusion 1.x": "sd_v1",
    "Stable Diffusion 2.x": "sd_v2",
    "Stable Diffusion XL": "sdxl_base_v1-0",
    "Stable Diffusion 3": "sd3",
    "FLUX.1": "flux1",
}


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """What an adapter's metadata may say in another file too."""
    return {
        key: value
        for key, value in metadata.items()
        if key not in _OF_THE_FILE and not key.endswith(":rank") and not (key.startswith("<") and value == "<embed>")
    }


def provenance(adapter: Adapter) -> dict[str, str]:
    """`modelspec.*` and `ss_*` keys that follow from the adapter itself, with its content hash."""
    family = family_of(named_layers(adapter))
    ranks = {layer.tensors["down"].shape[0] for *_, layer in adapter if "down" in layer.tensors}
    alphas = {layer.alpha for *_, layer in adapter if layer.alpha is not None}
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": adapter.name,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "lora_diffusion.version": __version__,
        "lora_diffusion.content_hash": adapter.content_hash,
    }
    if family.architecture:
        said["modelspec.architecture"] = f"{family.architecture}/lora"
    if len(adapter):
        said |= _for_kohya(family, adapter) | {
            "ss_network_dim": _one(ranks),
            "ss_network_alpha": _one(alphas),
        }
    return said


def named_layers(adapter: Adapter) -> list[Named]:
    """(component, layer, input width) as far as the tensors show it."""
    return [(component, name, _width(layer)) for component, name, layer in adapter]


def _width(layer: LayerAdapter) -> int:
    part = {"loha": "w1_b"}.get(layer.method, "down")
    if part in layer.tensors and layer.tensors[part].ndim > 1:
        return layer.tensors[part].shape[1]
    if layer.method == "lokr" and all(part in layer.tensors or f"{part}_b" in layer.tensors for part in ("w1", "w2")):
        first, second = (layer.tensors.get(part, layer.tensors.get(f"{part}_b")) for part in ("w1", "w2"))
        return first.shape[1] * second.shape[1] if first is not None and second is not None else 0
    return 0


def _for_kohya(family: Family, adapter: Adapter) -> dict[str, str]:
    lycoris = adapter.methods - {"lora"}
    module = "lycoris.kohya" if lycoris else _KOHYA_MODULES.get(family.name, "networks.lora")
    said = {"ss_network_module": module, "ss_v2": str(family.name == "Stable Diffusion 2.x")}
    if family.name in _KOHYA_BASES:
        said["ss_base_model_version"] = _KOHYA_BASES[family.name]
    return said


def _one(values: set[int] | set[float]) -> str:
    """The value all layers share; sd-scripts says "Dynamic" where they differ."""
    return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"
