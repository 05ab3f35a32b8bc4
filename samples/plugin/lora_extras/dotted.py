"""A spelling that says any adapter: each tensor's name has component, layer, method and tensor in full.

    extras/unet/mid_block.attentions.0.proj_in/lora/down
    extras/unet/mid_block.attentions.0.proj_in/lora/alpha      float64, ()

Methods from outside need such a spelling: the tools whose files the others read have no name for their tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats import Parsed

PREFIX = "extras/"


class Dotted:
    """Reads and writes names like the above."""

    name = "dotted"
    writes = True

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether any tensor has the prefix."""
        return any(key.startswith(PREFIX) for key in keys)

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """The neutral form; names of another kind stand in `unused`."""
        parsed = Parsed(layers={})
        found: dict[tuple[str, str], dict[str, dict[str, Tensor]]] = {}  # layer -> method -> tensors
        for key, tensor in tensors.items():
            words = key.removeprefix(PREFIX).split("/")
            if key.startswith(PREFIX) and len(words) == 4 and all(words):
                component, layer, method, part = words
                found.setdefault((component, layer), {}).setdefault(method, {})[part] = tensor
            else:
                parsed.unused[key] = f"expected {PREFIX}component/layer/method/tensor"
        for (component, layer), methods in found.items():
            (method, parts), *others = methods.items()
            if others or (parts.get("alpha", torch.zeros(())).numel() != 1):
                why = f"tensors of {' and '.join(methods)} on one layer" if others else "alpha is not one number"
                parsed.unused |= {_key(component, layer, m, part): why for m, of in methods.items() for part in of}
                continue
            alpha = parts.pop("alpha", None)
            held = (None, "none") if alpha is None else (float(alpha), "tensor")
            parsed.layers.setdefault(component, {})[layer] = LayerAdapter(method, parts, *held)
        return parsed

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata. AdapterFileError for tokens and for names with a slash."""
        if adapter.embeddings:
            raise AdapterFileError(f"adapter {adapter.name!r}: the dotted spelling has no place for tokens")
        tensors: dict[str, Tensor] = {}
        for component, name, layer in adapter:
            if "/" in component + name + layer.method:
                raise AdapterFileError(f"adapter {adapter.name!r}: {component} {name!r} has a slash in its name")
            tensors |= {_key(component, name, layer.method, part): tensor for part, tensor in layer.tensors.items()}
            if layer.alpha is not None:
                tensors[_key(component, name, layer.method, "alpha")] = torch.tensor(layer.alpha, dtype=torch.float64)
        return tensors, dict(adapter.metadata)


def _key(component: str, layer: str, method: str, part: str) -> str:
    return f"{PREFIX}{component}/{layer}/{method}/{part}"


DOTTED = Dotted()
