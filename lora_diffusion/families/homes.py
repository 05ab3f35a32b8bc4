"""Text encoders of a file -> those of the pipeline, which tools number and call in their own ways.

T5 is the third in sd-scripts' and ComfyUI's files, the second of FLUX and the only one of Chroma; Llama is the fourth
of HiDream and the first of HunyuanVideo, whose CLIP is the second. Where the pipeline has none of that number, or one
with other layers, the adapter belongs to the one that has all its layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.families.naming import resolve

Layers = Mapping[str, dict[str, LayerAdapter]]


def homes(layers: Layers, models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Component of a file -> component of the pipeline; itself where no other, or more than one, could be meant."""
    texts = [component for component in layers if component.startswith("text_encoder")]
    strays = [component for component in texts if not _has(models.get(component), layers[component], every=False)]
    taken = layers.keys() - strays
    found = {component: component for component in layers}
    for stray in strays:
        free = [name for name in models if name.startswith("text_encoder") and name not in taken]
        able = [name for name in free if _has(models[name], layers[stray], every=True)]
        if len(able) == 1:
            found[stray] = able[0]
            taken |= {able[0]}
    return found


def _has(model: nn.Module | None, layers: dict[str, LayerAdapter], *, every: bool) -> bool:
    if model is None:
        return False
    found = resolve(layers, model, strict=False)
    return not found.unmatched if every else bool(found.layers or found.faults)
