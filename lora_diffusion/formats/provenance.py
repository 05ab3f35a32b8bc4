"""Metadata for the files we write: the keys that other tools show, and those that would lie in the new file.

`modelspec.*` is https://github.com/Stability-AI/ModelSpec (1.0.0: architecture, implementation and title must be
there; a file whose architecture is unknown does not claim to obey it); `ss_*` are sd-scripts', `sshs_model_hash` is
what A1111 and Civitai know a file by.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_diffusion import __version__
from lora_diffusion.adapter import Adapter, LayerAdapter, flat
from lora_diffusion.formats import container
from lora_diffusion.formats.identity import UNKNOWN, Family, Named, family_of, family_of_tokens
from lora_diffusion.formats.peft_config import METADATA_KEY, SIDECAR_KEY

#: keys that speak of the spelling or bytes of the file they stood in
_OF_THE_FILE = re.compile(
    rf"{METADATA_KEY}|{SIDECAR_KEY}|format|sshs_\w+|modelspec\.(hash_\w+|implementation(_version)?)|unet|text_encoder"
    r"|.*:rank|lora_diffusion\.(version|content_hash|token)",
    re.DOTALL,
)
#: what follows from the adapter as it is now, whatever an older file said
_FOLLOWS = ("ss_network_dim", "ss_network_alpha")
_KOHYA_MODULES = {"Stable Diffusion 3": "networks.lora_sd3", "FLUX.1": "networks.lora_flux"}
_KOHYA_BASES = {
    "Stable Diffusion 1.x": "sd_v1",
    "Stable Diffusion 2.x": "sd_v2",
    "Stable Diffusion XL": "sdxl_base_v1-0",
    "Stable Diffusion 3": "sd3",
    "FLUX.1": "flux1",
}
#: method -> what LyCORIS calls it; None: sd-scripts' own modules say it too
_ALGORITHMS = {
    "lora": None,
    "dora": "lora",
    "locon": "locon",
    "loha": "loha",
    "lokr": "lokr",
    "ia3": "ia3",
    "glora": "glora",
    "oft": "diag-oft",
    "full": "full",
    "norm": "full",
}
_SAME_FAMILY = re.compile(r"stable-diffusion-\w+|[a-z]+-?\d*")
#: how the layers are called (flattened) -> the code base whose names these are
_IMPLEMENTATIONS = (
    (r"(input|output)_blocks_|middle_block_", "https://github.com/Stability-AI/generative-models"),
    (r"(double|single)_blocks_", "https://github.com/black-forest-labs/flux"),
    (r"joint_blocks_", "https://github.com/Stability-AI/sd3-ref"),
)


def metadata_for(adapter: Adapter, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a file of `adapter` says about it: its own metadata where they still hold, what follows, then `given`."""
    true, old = provenance(adapter), carried(adapter)
    return true | old | {key: true[key] for key in _FOLLOWS if key in true} | dict(given or {})


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What other tools know a file by: the SHA-256 of all that `container.write` puts behind the header."""
    digest = container.digest(tensors)
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def carried(adapter: Adapter) -> dict[str, str]:
    """What an adapter's metadata may say in another file too."""
    said = {
        key: value
        for key, value in adapter.metadata.items()
        if not _OF_THE_FILE.fullmatch(key) and not (key.startswith("<") and value == "<embed>")
    }
    family = family_for(adapter)
    if not _agree(said.get("modelspec.architecture", ""), family.architecture):
        said.pop("modelspec.architecture", None)
    if not said.get("ss_base_model_version", "").startswith(_KOHYA_BASES.get(family.name, "")):
        said.pop("ss_base_model_version", None)
    if len(adapter) and _method_of(said) not in {_alike(method) for method in adapter.methods}:
        said = {key: value for key, value in said.items() if key not in ("ss_network_module", "ss_network_args")}
    return said


def _agree(said: str, found: str) -> bool:
    """Whether two architectures are versions of one: "flux-1-schnell" and "flux-1-dev"."""
    ours, theirs = _SAME_FAMILY.match(found), _SAME_FAMILY.match(said)
    return not said or ours is None or (theirs is not None and theirs[0] == ours[0])


def _method_of(metadata: Mapping[str, str]) -> str:
    """The method that sd-scripts' keys name."""
    module = metadata.get("ss_network_module", "")
    try:
        arguments: Any = json.loads(metadata.get("ss_network_args", "{}"))
        algorithm = str(arguments.get("algo", "lora"))
    except (ValueError, AttributeError, RecursionError):
        algorithm = "lora"
    if not module.startswith("lycoris"):
        return "oft" if "oft" in module else "lora"
    return "oft" if algorithm in ("diag-oft", "boft") else _alike(algorithm)


def _alike(method: str) -> str:
    return "lora" if method in ("dora", "locon", "biased") else method


def provenance(adapter: Adapter) -> dict[str, str]:
    """`modelspec.*` and `ss_*` keys that follow from the adapter itself, with its content hash."""
    family = family_for(adapter)
    said = {
        "modelspec.title": adapter.name,
        "modelspec.implementation": _implementation(adapter),
        "lora_diffusion.version": __version__,
        "lora_diffusion.content_hash": adapter.content_hash,
    }
    if family.architecture:
        kind = "lora" if len(adapter) else "textual-inversion"
        said |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{family.architecture}/{kind}"}
    return said | (_for_kohya(family, adapter) if len(adapter) else {})


def named_layers(adapter: Adapter) -> list[Named]:
    """(component, layer, input width) as far as the tensors show it."""
    return [(component, name, _width(layer)) for component, name, layer in adapter]


def family_for(adapter: Adapter) -> Family:
    """The model family of an adapter's layers, or where it has none, of its tokens."""
    found = family_of(named_layers(adapter))
    widths = [{c: v.shape[1] for c, v in vectors.items()} for vectors in adapter.embeddings.values()]
    return family_of_tokens(widths) if found == UNKNOWN else found


def _implementation(adapter: Adapter) -> str:
    """The code base that calls its layers so: Diffusers, or the checkpoint's."""
    names = [flat(name) for component, name, _ in adapter if not component.startswith("text_encoder")]
    found = (where for sign, where in _IMPLEMENTATIONS if any(re.match(sign, name) for name in names))
    return next(found, "diffusers")


def _width(layer: LayerAdapter) -> int:
    part = {"loha": "w1_b"}.get(layer.method, "down")
    if part in layer.tensors and layer.tensors[part].ndim > 1:
        return layer.tensors[part].shape[1]
    if layer.method == "lokr" and all(part in layer.tensors or f"{part}_b" in layer.tensors for part in ("w1", "w2")):
        first, second = (layer.tensors.get(part, layer.tensors.get(f"{part}_b")) for part in ("w1", "w2"))
        return first.shape[1] * second.shape[1] if first is not None and second is not None else 0
    return 0


def _for_kohya(family: Family, adapter: Adapter) -> dict[str, str]:
    methods = Counter(layer.method for *_, layer in adapter)
    ranks = {layer.tensors["down"].shape[0] for *_, layer in adapter if "down" in layer.tensors}
    alphas = {layer.alpha for *_, layer in adapter if layer.alpha is not None}
    lycoris = methods.keys() - {"lora"}
    module = "lycoris.kohya" if lycoris else _KOHYA_MODULES.get(family.name, "networks.lora")
    said = {
        "ss_network_module": module,
        "ss_v2": str(family.name == "Stable Diffusion 2.x"),
        "ss_output_name": adapter.name,
        "ss_network_dim": _one(ranks),
        "ss_network_alpha": _one(alphas),
        "ss_base_model_version": _KOHYA_BASES.get(family.name, ""),
    }
    if algorithm := _ALGORITHMS.get(methods.most_common(1)[0][0]):
        said["ss_network_args"] = json.dumps({"algo": algorithm} | ({"dora_wd": "True"} if "dora" in methods else {}))
    return {key: value for key, value in said.items() if value}


def _one(values: set[int] | set[float]) -> str:
    """The value all layers share; sd-scripts says "Dynamic" where they differ."""
    return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic" if values else ""
