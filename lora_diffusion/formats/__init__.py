"""SEAM 2: spellings of adapter files. One file a spelling, each a whole-file `load` and `dump`.

Formats know keys, prefixes and metadata; they know no mathematics and no models. `load` turns the
tensors of a file into the neutral form, `dump` does the reverse, and `load(*dump(a)) == a` to the bit
for every format that writes (the contract test runs over the registry).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.registry import Registry

if TYPE_CHECKING:  # a header can be looked at without torch
    from torch import Tensor

    from lora_diffusion.adapter import Adapter, LayerAdapter


@dataclass
class Parsed:
    """What a format made of a file's tensors."""

    layers: dict[str, dict[str, LayerAdapter]]
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)  # key -> why it was not used


def check_components(adapter: Adapter, named: Collection[str], spelling: str) -> None:
    """AdapterFileError where an adapter has components that a spelling has no name for."""
    homeless = sorted(set(adapter.layers) - set(named))
    if homeless:
        raise AdapterFileError(f"adapter {adapter.name!r}: the {spelling} spelling has no name for {some(homeless)}")


class Format(Protocol):
    """One spelling of adapter files."""

    name: str
    writes: bool  # False: `dump` refuses every adapter

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether a file with these tensor names and this metadata is in this spelling."""
        ...

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """The neutral form. Every tensor is used or listed in `unused` with the reason."""
        ...

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata to write. AdapterFileError for what this spelling cannot say."""
        ...


#: tried in this order by `load_adapter`; the first that recognises a file reads it
FORMATS: Registry[Format] = Registry(
    "formats",
    {
        "cloneofsimo": "lora_diffusion.formats.cloneofsimo:CLONEOFSIMO",
        "embedding": "lora_diffusion.formats.embeddings:EMBEDDING",
        "xlabs": "lora_diffusion.formats.named:XLABS",
        "attention-processors": "lora_diffusion.formats.named:ATTENTION_PROCESSORS",
        "peft": "lora_diffusion.formats.named:PEFT",
        "diffusers": "lora_diffusion.formats.diffusers:DIFFUSERS",
        "kohya": "lora_diffusion.formats.kohya:KOHYA",
        "comfy": "lora_diffusion.formats.comfy:COMFY",
        "lycoris": "lora_diffusion.formats.named:LYCORIS",
        "bare": "lora_diffusion.formats.named:BARE",
    },
)
