"""LoRA and its relatives for diffusion models: train, load, blend, merge, take off again.

Everything public is exported here, and imported when it is first used, so that `import lora_diffusion`
stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_diffusion.adapter import Adapter as Adapter
    from lora_diffusion.adapter import LayerAdapter as LayerAdapter
    from lora_diffusion.attachment import Attachment as Attachment
    from lora_diffusion.attachment import attach as attach
    from lora_diffusion.errors import AdapterFileError as AdapterFileError
    from lora_diffusion.errors import AdapterMismatchError as AdapterMismatchError
    from lora_diffusion.errors import ConfigError as ConfigError
    from lora_diffusion.errors import DataError as DataError
    from lora_diffusion.errors import LoraDiffusionError as LoraDiffusionError
    from lora_diffusion.errors import TargetError as TargetError
    from lora_diffusion.formats.files import load_adapter as load_adapter
    from lora_diffusion.formats.files import save_adapter as save_adapter
    from lora_diffusion.gates import Region as Region
    from lora_diffusion.generating import missing_triggers as missing_triggers
    from lora_diffusion.merging import bake as bake
    from lora_diffusion.merging import conflicts as conflicts
    from lora_diffusion.merging import extract as extract
    from lora_diffusion.merging import merge as merge
    from lora_diffusion.merging import resize as resize
    from lora_diffusion.methods.lora import LoRA as LoRA
    from lora_diffusion.pipelines import load_pipeline as load_pipeline
    from lora_diffusion.recomputing import Recompute as Recompute
    from lora_diffusion.stack import AdapterStack as AdapterStack
    from lora_diffusion.training.config import TrainConfig as TrainConfig
    from lora_diffusion.training.loop import train as train
    from lora_diffusion.training.results import TrainResult as TrainResult

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterFileError": "errors",
    "AdapterMismatchError": "errors",
    "AdapterStack": "stack",
    "Attachment": "attachment",
    "ConfigError": "errors",
    "DataError": "errors",
    "LayerAdapter": "adapter",
    "LoRA": "methods.lora",
    "LoraDiffusionError": "errors",
    "Recompute": "recomputing",
    "Region": "gates",
    "TargetError": "errors",
    "TrainConfig": "training.config",
    "TrainResult": "training.results",
    "attach": "attachment",
    "bake": "merging",
    "conflicts": "merging",
    "extract": "merging",
    "load_adapter": "formats.files",
    "load_pipeline": "pipelines",
    "merge": "merging",
    "missing_triggers": "generating",
    "resize": "merging",
    "save_adapter": "formats.files",
    "train": "training.loop",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_diffusion' has no attribute {name!r}")
    return getattr(import_module(f"lora_diffusion.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
