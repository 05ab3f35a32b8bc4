"""Weighted adapters written into a base model for good, as a Diffusers folder that needs no adapter.

The sum is taken in float32 and rounded once to the precision of the folder. A 4-bit folder rounds again, to a grid
of sixteen values, and a small delta can vanish there: how much survives is measured first,

    kept = <Q(W + D) - Q(W), D> / <D, D>      over all layers that are quantised
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import DENOISERS, Adapter
from lora_diffusion.errors import ConfigError
from lora_diffusion.fusing import fused_weight
from lora_diffusion.pipelines import DTYPES, denoiser_of, load_pipeline, quiet
from lora_diffusion.quantize import WeightFiles, dequantize, quantize, save_quantized
from lora_diffusion.quantize.layers import four_bit
from lora_diffusion.quantize.plan import plan
from lora_diffusion.stack import AdapterStack

LEAST_KEPT = 0.9  # a 4-bit bake that keeps less than this of the delta is refused

Into = Literal["fp32", "bf16", "fp16", "nf4"]


@dataclass(frozen=True)
class Baked:
    """The folder, its precision, and the share of the delta that survives its rounding (1 where not measured)."""

    folder: Path
    precision: str
    kept: float


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
    ConfigError where less than 0.9 of the delta survives, unless `force`. ConfigError for a folder that is not
    empty, AdapterMismatchError for an adapter of another model.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another folder to bake into")
    pipe = load_pipeline(base, precision="fp32", device="cpu").pipe
    into = precision or _stored(base)
    small = to_quantise(denoiser_of(pipe)) if into == "nf4" else set()
    stack, kept = AdapterStack(pipe), 1.0
    for adapter, weight in adapters:
        stack.add(adapter, weight)
    if into == "nf4":
        kept = survival(denoiser_of(pipe), stack, small)
        if kept < LEAST_KEPT and not force:
            raise ConfigError(
                f"bake: {kept:.2f} of the delta would survive in nf4, expected at least {LEAST_KEPT}; "
                "keep the adapter beside the 4-bit base, bake into bf16, or force it"
            )
    stack.bake()
    with quiet():
        _save(pipe, out, into)
    return Baked(out, into, kept)


def to_quantise(denoiser: nn.Module) -> set[str]:
    """The layers of a dense denoiser without adapters that NF4 quantises."""
    fates = plan(denoiser, "nf4", keep=(), eight_bit=(), keep_adaln=False)
    return {name for name, fate in fates.items() if fate.stored == "nf4"}


def survival(denoiser: nn.Module, stack: AdapterStack, small: Collection[str]) -> float:
    """The share of the stack's delta that NF4 would keep on the layers `small` of a dense denoiser."""
    applied = whole = 0.0
    component, slots = next((component, of) for component, of in stack.slots.items() if component in DENOISERS)
    for name, slot in slots.items():
        layer = denoiser.get_submodule(name)
        if isinstance(layer, nn.Linear) and name in small:
            merged = fused_weight(layer, slot, stack.shares(component, name))
            delta = merged - layer.weight
            applied += float(((_rounded(layer, merged) - _rounded(layer, layer.weight)) * delta).sum())
            whole += float(delta.square().sum())
    return applied / whole if whole else 1.0


def _rounded(layer: nn.Linear, weight: Tensor) -> Tensor:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
    device = torch.device("cpu")
    return dequantize(four_bit(dense, device=device, dtype=torch.float32, double_quant=True, block_size=64))


def _stored(base: str | Path) -> Into:
    for component in DENOISERS:
        if (folder := Path(base).expanduser() / component).is_dir():
            dtype = next(tensor.dtype for tensor in WeightFiles(folder).values() if tensor.is_floating_point())
            return "bf16" if dtype == torch.bfloat16 else "fp16" if dtype == torch.float16 else "fp32"
    return "bf16"


def _save(pipe: Any, out: Path, into: Into) -> None:
    if into != "nf4":
        pipe.to(dtype=DTYPES[into]).save_pretrained(out, safe_serialization=True)
        return
    pipe.to(dtype=torch.bfloat16).save_pretrained(out, safe_serialization=True)
    denoiser = denoiser_of(pipe)
    folder = out / next(name for name in DENOISERS if getattr(pipe, name, None) is denoiser)
    quantize(denoiser, "nf4", compute_dtype=torch.bfloat16)
    save_quantized(denoiser, folder)
    for dense in folder.glob("diffusion_pytorch_model*"):
        dense.unlink()
