"""T-LoRA in what is no stack: the ranks that act by the noise act at every step there, and that is said."""

from __future__ import annotations

import warnings
from dataclasses import replace

from lora_diffusion.adapter import Adapter
from lora_diffusion.gates.fading import KEY


def at_full_rank(adapter: Adapter, doing: str) -> Adapter:
    """The adapter without what its metadata ask for by the noise; a UserWarning where they do."""
    if KEY not in adapter.metadata:
        return adapter
    warnings.warn(
        f"{doing}: adapter {adapter.name!r} was trained with fewer ranks the more noise there is (T-LoRA); "
        "what comes out has all of them at every step",
        stacklevel=3,
    )
    return replace(adapter, metadata={key: said for key, said in adapter.metadata.items() if key != KEY})
