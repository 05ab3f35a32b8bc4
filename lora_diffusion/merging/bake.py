"""Weighted adapters written into a base model for good, as a Diffusers folder that needs no adapter.

The sum is taken in float32 and rounded once to the precision of the folder. A 4-bit folder rounds again, to a grid
of sixteen values, and a small delta can vanish there: how much survives is measured first (`survival.py`). Of a base
that is in 4 bits already, what no adapter is on keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn

from lora_diffusion.adapter import DENOISERS, Adapter
from lora_diffusion.drafts import whole_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.merging.survival import Survival, survival
from lora_diffusion.pipelines import DTYPES, Opened, denoiser_of, kept_layers, load_for_drawing, quiet
from lora_diffusion.quantize import WeightFiles, dequantize, is_quantized, quantize, save_quantized
from lora_diffusion.quantize.layers import is_four_bit
from lora_diffusion.quantize.plan import plan
from lora_diffusion.stack import AdapterStack

LEAST_KEPT = 0.9  # a 4-bit bake that keeps less than this of the delta is refused

Into = Literal["fp32", "bf16", "fp16", "nf4"]


@dataclass(frozen=True)
class Baked:
    """The folder, its precision, and what of the delta survives its rounding (all of it where not measured)."""

    folder: Path
    precision: str
    survival: Survival

    @property
    def kept(self) -> float:
        """The lower of share and cosine, from 1 down."""
        return self.survival.least


def bake(
    base: str | Path,
    adapters: Sequence[tuple[Adapter | str | Path, Any]],
    out: str | Path,
    *,
    precision: Into | None = None,
    force: bool = False,
) -> Baked:
    """Write `base` with (adapter, weight) pairs merged in to the new folder `out`.

    `precision` None: as the base's denoiser is stored. "nf4" writes the denoiser as `save_quantized` does, and raises
    ConfigError where less than 0.9 of the delta survives, by share or by cosine, unless `force`. ConfigError too for a
    folder that is not empty or cannot be written, a weight by step, image or place, and a base in int8 without a
    precision; AdapterMismatchError for an adapter of another model. After a failure `out` is as it was.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another folder to bake into")
    opened = load_for_drawing(base, None, "cpu")
    pipe, denoiser = opened.pipe, denoiser_of(opened.pipe)
    into, held = precision or _stored(base, opened), made_dense(denoiser)
    if not any(map(is_four_bit, held.values())):
        held = dict[str, nn.Module]()  # a base in int8 is dense from here on
    with quiet():
        pipe.to(dtype=torch.float32)
    small = to_quantise(denoiser, kept_layers(pipe), held) if into == "nf4" else {}
    stack, left = AdapterStack(pipe), Survival()
    for adapter, weight in adapters:
        stack.add(adapter, weight)
    if into == "nf4":
        stack.fuse()  # what cannot be fused says so before anything is measured
        stack.unfuse()
        left = survival(denoiser, stack, [name for name, stored in small.items() if stored == "nf4"], held)
        if left.least < LEAST_KEPT and not force:
            raise ConfigError(
                f"bake: {left} would survive in nf4, expected at least {LEAST_KEPT} of both; "
                "keep the adapter beside the 4-bit base, bake into bf16, or force it"
            )
    touched = {name for component in DENOISERS for name in stack.slots.get(component, {})}
    stack.bake()
    place = out.resolve()
    try:
        with quiet(), whole_folder(place) as draft:
            if into == "nf4":
                still = {name: layer for name, layer in held.items() if name not in touched}
                _save_nf4(pipe, draft, opened.dtype if held else torch.bfloat16, small, still)
            else:
                pipe.to(dtype=DTYPES[into]).save_pretrained(draft, safe_serialization=True)
            if place.exists():
                place.rmdir()  # empty, or it would have been refused
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{place}: cannot be written ({error}); nothing was changed") from None
    return Baked(out, into, left)


def made_dense(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Put a plain float32 layer in the place of every quantised one; name -> what was there."""
    held = {name: layer for name, layer in denoiser.named_modules() if is_quantized(layer)}
    for name, layer in held.items():
        known: Any = layer
        dense = nn.Linear(known.in_features, known.out_features, bias=known.bias is not None, device="meta")
        dense.weight = nn.Parameter(dequantize(layer), requires_grad=False)
        if known.bias is not None:
            dense.bias = nn.Parameter(known.bias.detach().float(), requires_grad=False)
        denoiser.set_submodule(name, dense.train(layer.training))
    return held


def to_quantise(
    denoiser: nn.Module, keep: Sequence[str] = (), held: Mapping[str, nn.Module] | None = None
) -> dict[str, str]:
    """Layer of a dense denoiser without adapters -> "nf4" or "int8": as a base was (`held`), else as a fresh one is."""
    if held:
        return {name: "nf4" if is_four_bit(layer) else "int8" for name, layer in held.items()}
    fates = plan(denoiser, "nf4", keep=keep, eight_bit=(), keep_adaln=False)
    return {name: fate.stored for name, fate in fates.items() if fate.stored in ("nf4", "int8")}


def _stored(base: str | Path, opened: Opened) -> Into:
    """The precision that the base's denoiser has on disk."""
    if opened.report is not None:  # written by `save_quantized`
        layers = [layer for _, layer in denoiser_of(opened.pipe).named_modules() if is_quantized(layer)]
        if layers and not any(map(is_four_bit, layers)):
            raise ConfigError(f"bake: base {str(base)!r} is in int8, which is not written; say a precision")
        return "nf4" if layers else _name_of(opened.dtype)
    for component in DENOISERS:
        if (folder := Path(base).expanduser() / component).is_dir():
            return _name_of(next(tensor.dtype for tensor in WeightFiles(folder).values() if tensor.is_floating_point()))
    return "bf16"


def _name_of(dtype: torch.dtype) -> Into:
    return cast("Into", next((name for name, one in DTYPES.items() if one == dtype), "fp32"))


def _save_nf4(
    pipe: Any, out: Path, dtype: torch.dtype, small: Mapping[str, str], still: Mapping[str, nn.Module]
) -> None:
    """Save with the denoiser in NF4: layers in `small` are quantised, those in `still` put back as they were."""
    pipe.to(dtype=dtype).save_pretrained(out, safe_serialization=True)
    denoiser = denoiser_of(pipe)
    folder = out / next(name for name in DENOISERS if getattr(pipe, name, None) is denoiser)
    for name, layer in still.items():
        denoiser.set_submodule(name, layer)
    eight = [name for name, stored in small.items() if stored == "int8" and name not in still]
    quantize(denoiser, "nf4", compute_dtype=dtype, keep=_others(denoiser, small), eight_bit=eight)
    save_quantized(denoiser, folder)
    for dense in folder.glob("diffusion_pytorch_model*"):
        dense.unlink()


def _others(denoiser: nn.Module, small: Collection[str]) -> list[str]:
    """Every linear layer that is not to be quantised."""
    return [name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear) and name not in small]
