"""The files of cloneofsimo/lora: layers by number, ranks in the metadata, tokens beside them.

    unet:0:up (out, rank)    unet:0:down (rank, in)    text_encoder:0:up …    <s1> (768)
    metadata: {"unet": '["CrossAttention", "GEGLU"]', "unet:0:rank": "4", "<s1>": "<embed>"}

The scale is 1. Which layer a number is, only the model can say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats import Parsed
from lora_diffusion.formats.embeddings import take_embeddings

_KEY = re.compile(r"(?P<component>unet|text_encoder):(?P<number>\d{1,4}):(?P<part>up|down)")


class Cloneofsimo:
    """Reads what `save_safeloras_with_embeds` writes."""

    name = "cloneofsimo"
    writes = False

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether any tensor is named by component, number and part."""
        return any(_KEY.fullmatch(key) for key in keys)

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """Layers called "#0", "#1", …; the model's order gives them their names."""
        parsed = Parsed(layers={})
        parsed.embeddings, rest = take_embeddings(tensors, parsed.unused)
        pairs: dict[tuple[str, int], dict[str, str]] = {}
        for key in rest:
            found = _KEY.fullmatch(key)
            if found:
                pairs.setdefault((found["component"], int(found["number"])), {})[found["part"]] = key
            else:
                parsed.unused[key] = "no tensor of these files is spelled like that"
        for (component, number), parts in sorted(pairs.items()):
            if len(parts) < 2 or tensors[parts["down"]].ndim < 2 or not tensors[parts["down"]].numel():
                parsed.unused |= dict.fromkeys(parts.values(), "its other half is not in the file")
                continue
            pair = {part: tensors[key] for part, key in parts.items()}
            layer = LayerAdapter("lora", pair, float(pair["down"].shape[0]), "assumed")
            parsed.layers.setdefault(component, {})[f"#{number}"] = layer
        return parsed

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """AdapterFileError always: nothing reads these files any more."""
        raise AdapterFileError(f"adapter {adapter.name!r}: the cloneofsimo spelling is only read; choose another")


CLONEOFSIMO = Cloneofsimo()
