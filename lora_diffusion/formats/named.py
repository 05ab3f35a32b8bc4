"""Spellings that differ in their names alone: read by the shared tables, recognised by what is typical of them.

base_model.model.proj_out.lora_A.weight                            PEFT's save_pretrained; alpha in its folder
double_blocks.0.processor.qkv_lora1.down.weight                    XLabs
down_blocks.0…attn1.processor.to_q_lora.down.weight                attention processors of Diffusers <= 0.21
lycoris_transformer_blocks_0_attn_to_q.lokr_w1                     LyCORIS' wrapper, SimpleTuner
transformer_blocks.0.attn.to_q.lora_down.weight                    no prefix: DiffSynth, lightx2v, BFL
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats import Parsed
from lora_diffusion.formats.assemble import assemble
from lora_diffusion.formats.keys import split
from lora_diffusion.formats.peft_adalora import with_values_inside
from lora_diffusion.formats.peft_config import OneScale, Scales, sidecar_scales, without_magnitudes
from lora_diffusion.formats.peft_vera import with_projection


class Named:
    """A spelling that is recognised by a pattern at the start of its names, and only read."""

    writes = False

    def __init__(self, name: str, pattern: str) -> None:
        self.name = name
        self._pattern = re.compile(pattern)

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether any tensor's name has the pattern and a suffix that is known."""
        named = (split(key) for key in keys if self._pattern.match(key))
        return any(name is not None and name.method not in ("*", "ia3") for name in named)

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """The neutral form; alphas from tensors, or from the `adapter_config.json` of a PEFT folder."""
        scales = sidecar_scales(metadata)
        if self.name == "peft":
            tensors = with_projection(tensors, metadata)
            tensors = with_values_inside(tensors, is_adalora=isinstance(scales, OneScale))
        parsed = assemble(tensors, (lambda _, layer, rank: scales.alpha(layer, rank)) if scales else lambda *_: None)
        return without_magnitudes(parsed, list(parsed.layers) if isinstance(scales, Scales) and scales.dora else ())

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """AdapterFileError always."""
        raise AdapterFileError(
            f"adapter {adapter.name!r}: the {self.name} spelling is only read; write diffusers, kohya or comfy, "
            "or a PEFT folder (save_peft_folder)"
        )


PEFT = Named("peft", r"(unet\.)?base_model\.model\.")
XLABS = Named("xlabs", r"(double|single)_blocks\.\d+\.processor\.")
ATTENTION_PROCESSORS = Named("attention-processors", r".+\.processor\.|.+\.self_attn\.to_\w+_lora\.")
LYCORIS = Named("lycoris", r"lycoris_")
BARE = Named("bare", r"")
