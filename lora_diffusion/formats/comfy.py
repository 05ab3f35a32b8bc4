"""The ComfyUI spelling: `diffusion_model.` before the checkpoint's own layer names, alpha tensors beside the pairs.

    diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight    (rank, in)      = down
    diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight      (out, rank)     = up
    diffusion_model.double_blocks.0.img_attn.qkv.alpha               ()
    text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight

ComfyUI reads `lora_A` and `lora_B` as well, as ai-toolkit writes them; Diffusers 0.42 loads nothing of such a file
of FLUX, without an error, and loads this one. Layer names are kept: give an adapter the checkpoint's own names first
(`families.original.named_for`), for ComfyUI knows only those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from lora_diffusion.adapter import Adapter, same_layer
from lora_diffusion.formats import Parsed, check_components
from lora_diffusion.formats.assemble import assemble
from lora_diffusion.formats.embeddings import bundled
from lora_diffusion.formats.keys import numbered_as
from lora_diffusion.formats.kohya import layer_tensors

_STARTS = ("diffusion_model.", "model.diffusion_model.", "text_encoders.", "text_embedding_projection.")
_PREFIXES = {
    "unet": "diffusion_model.",
    "transformer": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
    "text_encoder_4": "text_encoders.llama.transformer.",
    "text_conditioner": "diffusion_model.llm_adapter.",
    "connectors": "text_embedding_projection.",
}


class Comfy:
    """Reads and writes ComfyUI's generic adapter files."""

    name = "comfy"
    writes = True

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether any tensor has one of its prefixes."""
        return any(key.startswith(_STARTS) for key in keys)

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """The neutral form, under the checkpoint's layer names that the live model resolves."""
        return assemble(tensors)

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata. AdapterFileError for components or methods without a name here."""
        who = f"adapter {adapter.name!r}"
        check_components(adapter, _PREFIXES, "ComfyUI")
        tensors = bundled(adapter.embeddings, who)
        prefixes = {component: _PREFIXES[numbered_as(component, adapter.layers)] for component in adapter.layers}
        for component, name, layer in adapter:
            clip = component in ("text_encoder", "text_encoder_2") and same_layer(name).startswith("encoder_layers_")
            level = "text_model." if clip and not name.startswith("text_model") else ""
            tensors |= layer_tensors(f"{prefixes[component]}{level}{name}", layer, who)
        return tensors, dict(adapter.metadata)


COMFY = Comfy()
