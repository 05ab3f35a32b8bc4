"""Quantising a model in place, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.quantize.contents import frozen_modules, own_tensors, tie, ties
from lora_diffusion.quantize.int8 import Int8Linear, bias_of
from lora_diffusion.quantize.layers import bitsandbytes, four_bit, is_four_bit, is_quantized
from lora_diffusion.quantize.plan import DTYPES, Fate, Precision, plan, reason_for
from lora_diffusion.quantize.report import LayerCost, QuantizationReport
from lora_diffusion.quantize.streaming import check_weights, fill

__all__ = ["checked_device", "quantize", "report_on"]


@torch.no_grad()
def quantize(
    model: nn.Module,
    precision: Precision,
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    keep: Sequence[str] = (),
    eight_bit: Sequence[str] = (),
    keep_adaln: bool = False,
    double_quant: bool = True,
    block_size: int = 64,
    device: torch.device | str | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> QuantizationReport:
    """Quantise and freeze `model` in place, moving each layer to `device` on the way if one is given.

    Embedders and output projections stay in `compute_dtype`, as do layers matching a glob of `keep` (names as in
    `named_modules`; a glob takes in everything below) and, with `keep_adaln`, the timestep modulation. Layers
    matching `eight_bit` (`ADALN`, for instance) get int8 where the rest gets nf4. Everything that is not a plain
    `nn.Linear` is cast to `compute_dtype` (for precision bf16, fp16, fp32: to that one). Quantise first, attach
    adapters afterwards.

    With `weights` the values are read from there, name by name, layer after layer: for a model whose parameters are
    on the meta device (`empty_model`, `WeightFiles`), so that the dense model is never in memory.

    Returns what each layer became, why, and its bytes. Raises ConfigError for an unknown precision or block size,
    a device that is not there, missing bitsandbytes, a layer with adapters on it or weights of another model;
    TargetError for a glob that matches no linear layer. Nothing has been changed when it raises, unless a weight
    turned out to have another shape.
    """
    where = None if device is None else checked_device(device)
    fates = plan(model, precision, keep=keep, eight_bit=eight_bit, keep_adaln=keep_adaln)
    if any(fate.stored == "nf4" for fate in fates.values()):
        bitsandbytes()
        if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ConfigError(f"block_size is {block_size}; expected a power of two from 32 to 4096 (QLoRA: 64)")
    dtype, pairs = DTYPES.get(precision, compute_dtype), ties(model)
    if weights is not None:
        check_weights(model, weights)
    for name in [name for name, _ in frozen_modules(model)]:
        module = model.get_submodule(name)
        if weights is not None:
            fill(module, name, weights)
        stored = fates[name].stored if name in fates else "kept"
        if stored == "kept":
            if not is_quantized(module):
                _cast(module, where, dtype)
            continue
        assert isinstance(module, nn.Linear)
        home = where or module.weight.device
        if stored == "nf4":
            new = four_bit(module, device=home, dtype=dtype, double_quant=double_quant, block_size=block_size)
        else:
            new = Int8Linear.from_linear(module, device=home, dtype=dtype)
        model.set_submodule(name, new)
    tie(model, pairs)
    model.requires_grad_(requires_grad=False)
    return report_on(model, precision, fates)


def report_on(model: nn.Module, precision: str, fates: Mapping[str, Fate]) -> QuantizationReport:
    """What `model` is stored as now, with the reasons in `fates`."""
    return QuantizationReport(precision, tuple(_costs(model, fates)))


def checked_device(device: torch.device | str) -> torch.device:
    """`device` as torch knows it. ConfigError for a name torch does not know and for CUDA where there is none."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; expected 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {str(device)!r}, but torch sees no CUDA GPU; use device 'cpu'")
    return found


def _cast(module: nn.Module, device: torch.device | None, dtype: torch.dtype) -> None:
    """Move a module's own tensors; cast its floats, but not buffers that the module computes for itself."""
    for parameter in module.parameters(recurse=False):  # in place, so that tied parameters stay tied
        if parameter.is_meta and device is not None:  # waits for its twin
            continue
        parameter.data = parameter.data.to(device=device, dtype=dtype if parameter.is_floating_point() else None)
    saved = module.state_dict(keep_vars=True)
    for name, buffer in list(module.named_buffers(recurse=False)):
        cast = name in saved and buffer.is_floating_point()
        setattr(module, name, buffer.to(device=device, dtype=dtype if cast else None))


def _costs(model: nn.Module, fates: Mapping[str, Fate]) -> Iterator[LayerCost]:
    seen: set[int] = set()
    for name, module in frozen_modules(model):
        tensors = [tensor for _, tensor in own_tensors(module) if tensor.is_meta or tensor.data_ptr() not in seen]
        seen.update(tensor.data_ptr() for tensor in tensors)
        if not tensors:
            continue
        kind = type(module).__name__
        stored = "nf4" if is_four_bit(module) else str(tensors[0].dtype).removeprefix("torch.")
        reason = fates[name].reason if name in fates else reason_for(kind)
        yield LayerCost(name, kind, stored, reason, _numbers(module), sum(tensor.nbytes for tensor in tensors))


def _numbers(module: nn.Module) -> int:
    """How many numbers a module stands for, packed or not."""
    if not is_quantized(module):
        return sum(tensor.numel() for _, tensor in own_tensors(module))
    assert isinstance(module, nn.Linear)
    bias = bias_of(module)
    return module.in_features * module.out_features + (0 if bias is None else bias.numel())
