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

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from lora_diffusion.adapter import Adapter, flat, same_layer
from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.formats import Parsed, check_components
from lora_diffusion.formats.assemble import assemble
from lora_diffusion.formats.embeddings import bundled
from lora_diffusion.formats.encoders import BYT5, numbered_as, second_t5
from lora_diffusion.formats.keys import is_flattened, is_language_model
from lora_diffusion.formats.kohya import layer_tensors
from lora_diffusion.formats.provenance import family_for, named_layers

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
#: width of a language model -> what ComfyUI calls it
_LANGUAGE_MODELS = {
    1024: "qwen3_06b",
    2304: "gemma2_2b",
    2560: "qwen3_4b",
    3584: "qwen25_7b",
    4096: "qwen3_8b",
    5120: "mistral3_24b",
}
_READS_STATES = re.compile(r"_(q|k|v|gate|up)_proj$")


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
        """Tensors and metadata. AdapterFileError for components or methods without a name here, flattened names."""
        who = f"adapter {adapter.name!r}"
        check_components(adapter, _PREFIXES, "ComfyUI")
        if flattened := [name for _, name, _ in adapter if is_flattened(name)]:
            raise AdapterFileError(
                f"{who}: {some(flattened)} are flattened names; ComfyUI needs dotted ones here, which only the model"
                " has (`convert --base` names it)"
            )
        tensors = bundled(adapter.embeddings, who)
        numbers = {component: numbered_as(component, adapter) for component in adapter.layers}
        prefixes = {component: _PREFIXES[number] for component, number in numbers.items()}
        if (second := second_t5(adapter)) == "unknown":
            raise AdapterFileError(
                f"{who}: ComfyUI calls FLUX's T5 and HunyuanImage's by other names, and neither its width nor"
                " another component tells whose this text_encoder_2 is; write it beside the pipeline's other layers"
            )
        if second == BYT5:
            prefixes["text_encoder_2"] = f"text_encoders.{BYT5}.transformer."
        if "text_encoder" in prefixes:
            prefixes["text_encoder"] = f"text_encoders.{_first_encoder(adapter)}.transformer."
        for component, name, layer in adapter:
            clip = component in ("text_encoder", "text_encoder_2") and same_layer(name).startswith("encoder_layers_")
            level = "text_model." if clip and not name.startswith("text_model") else ""
            tensors |= layer_tensors(f"{prefixes[component]}{level}{name}", layer, who)
        return tensors, dict(adapter.metadata)


def _first_encoder(adapter: Adapter) -> str:
    """What ComfyUI calls a pipeline's first text encoder; a language model of a width that it has none of, as we do."""
    if not is_language_model(adapter.layers["text_encoder"]):
        return "clip_h" if family_for(adapter).name == "Stable Diffusion 2.x" else "clip_l"
    of_states = (
        width for c, name, width in named_layers(adapter) if c == "text_encoder" and _READS_STATES.search(flat(name))
    )
    return _LANGUAGE_MODELS.get(next(of_states, 0), "text_encoder")


COMFY = Comfy()
