"""From a blend to a file: merge, resize, extract, bake; and conflicts, which says beforehand how it will go."""

from lora_diffusion.merging.bake import Baked, bake
from lora_diffusion.merging.conflicts import Conflict, conflicts
from lora_diffusion.merging.extract import Extracted, extract
from lora_diffusion.merging.merge import Merged, merge
from lora_diffusion.merging.resize import Resized, cut, resize

__all__ = [
    "Baked",
    "Conflict",
    "Extracted",
    "Merged",
    "Resized",
    "bake",
    "conflicts",
    "cut",
    "extract",
    "merge",
    "resize",
]
