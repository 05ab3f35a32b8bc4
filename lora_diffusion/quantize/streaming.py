"""Quantising while loading, so that memory holds the quantised model and one dense layer, never the dense model.

denoiser = empty_model(UNet2DConditionModel, folder)             # shapes only
report = quantize(denoiser, "nf4", weights=WeightFiles(folder))  # each layer is read when its turn comes
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError, some
from lora_diffusion.quantize.contents import ties

__all__ = ["WeightFiles", "check_weights", "empty_encoder", "empty_model", "encoder_weights", "fill"]

M = TypeVar("M", bound=nn.Module)
_FILE = r"(diffusion_pytorch_model|model){variant}(-\d+-of-\d+)?\.safetensors"


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a model folder by name, in one file or several, each read when it is asked for.

    `variant` chooses among differently named files, as in Diffusers ("fp16"). ConfigError where there are none or
    one cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, variant: str | None = None) -> None:
        pattern = re.compile(_FILE.format(variant=re.escape(f".{variant}") if variant else ""))
        files = [path for path in sorted(Path(folder).glob("*.safetensors")) if pattern.fullmatch(path.name)]
        if not files:
            of = f" of variant {variant!r}" if variant else ""
            raise ConfigError(f"{folder}: holds no model weights{of}; expected diffusion_pytorch_model.safetensors")
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path}: cannot be read as model weights: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _Renamed(Mapping[str, Tensor]):
    """Weights under other names: new name -> name in `weights`."""

    def __init__(self, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def empty_model(kind: type[M], folder: str | os.PathLike[str]) -> M:
    """A Diffusers model of class `kind` as configured in `folder`, in eval mode, without memory for its weights."""
    from accelerate import init_empty_weights

    diffusers_kind: Any = kind
    with init_empty_weights(include_buffers=False):  # modules compute their buffers, and no file has them
        return diffusers_kind.from_config(diffusers_kind.load_config(folder)).eval()


def empty_encoder(kind: str, folder: str | os.PathLike[str]) -> nn.Module:
    """A Transformers model of the class called `kind`, likewise. AttributeError for a class that there is not."""
    import transformers
    from accelerate import init_empty_weights

    transformers_kind: Any = getattr(transformers, kind)
    with init_empty_weights(include_buffers=False):
        model = transformers_kind(transformers_kind.config_class.from_pretrained(folder)).eval()
    model.tie_weights()  # it was tied before its parameters went to the meta device
    return model


def encoder_weights(model: nn.Module, folder: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors in `folder` under the names that Transformers gives them while it loads them into `model`.

    Files of Qwen2.5-VL have the names of an earlier Transformers, those of Z-Image's Qwen3 the names of a model with
    a head. What the model has no place for is left out, as Transformers does. ConfigError where some are missing, or
    are made from others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transformer: Any = model
    changes, state = get_model_conversion_mapping(transformer), model.state_dict()
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    makings = [change for change in changes if isinstance(change, WeightConverter)]
    files, names = WeightFiles(folder), dict[str, str]()
    for key in sorted(files):
        name, made = rename_source_key(key, renamings, makings, transformer.base_model_prefix, state)
        if made is not None:
            raise ConfigError(f"{folder}: {key} is no weight of {type(model).__name__} but one that some are made from")
        if name in state:
            names[name] = key
    weights = _Renamed(files, names)
    check_weights(model, weights)
    return weights


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """ConfigError unless `weights` has exactly the names of `model`; a tied parameter may have either of its names."""
    expected = set(model.state_dict())
    twins = {name for pair in ties(model) for name in pair}
    missing, extra = expected - set(weights) - twins, set(weights) - expected
    if missing or extra:
        found = f"lack {some(sorted(missing))}" if missing else f"have {some(sorted(extra))} too much"
        raise ConfigError(f"the weights {found}; they belong to another model than {type(model).__name__}")


def fill(module: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    """Read the tensors that `module`, called `name` in its model, holds itself. ConfigError for another shape."""
    prefix = f"{name}." if name else ""
    saved = module.state_dict(keep_vars=True)
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for key, old in own:
        if key not in saved or (old.is_meta and prefix + key not in weights):  # computed, or filled by its twin
            continue
        new = weights[prefix + key]
        if new.shape != old.shape:
            found, expected = tuple(new.shape), tuple(old.shape)
            raise ConfigError(f"the weight {prefix}{key} has shape {found}; the model's configuration says {expected}")
        setattr(module, key, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
