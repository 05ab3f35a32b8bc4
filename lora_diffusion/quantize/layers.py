"""The 4-bit layer, made and read; the one place that imports bitsandbytes, when it is first needed."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.quantize.int8 import Int8Linear, bias_of

__all__ = ["bitsandbytes", "dequantize", "four_bit", "four_bit_from_bytes", "is_four_bit", "is_quantized"]

_PIECE = 2**20  # weights; a multiple of every block size

# bitsandbytes logs this once an import on CPUs with AVX512-BF16, for an optional package that nothing here needs
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)


def bitsandbytes() -> Any:
    """The package; ConfigError where it is missing."""
    try:
        import bitsandbytes
    except ImportError as error:
        message = "precision 'nf4' needs bitsandbytes, which cannot be imported; install it or use int8 or bf16"
        raise ConfigError(message) from error
    return bitsandbytes


def four_bit(
    layer: nn.Linear, *, device: torch.device, dtype: torch.dtype, double_quant: bool, block_size: int
) -> nn.Linear:
    """`layer` in NF4 on `device`: bitsandbytes' `Linear4bit`, frozen, computing in `dtype`.

    Output and input gradient equal those of the dequantised weight bit for bit. `layer` is left as it was.
    """
    bias = bias_of(layer)
    new = _empty(layer.in_features, layer.out_features, dtype, bias=bias is not None, double_quant=double_quant)
    payload, state = _nf4(layer.weight.detach().to(device), double_quant=double_quant, block_size=block_size)
    state.dtype = dtype  # else the backward pass would rebuild the weight in the original's dtype
    new.weight = bitsandbytes().nn.Params4bit(
        payload,
        requires_grad=False,
        quant_state=state,
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=new,
        bnb_quantized=True,
    )
    new.quant_state = state
    if bias is not None:  # in the compute dtype from the start: the layer would recast it in its first forward
        new.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype), requires_grad=False)
    return new.train(layer.training)


def _nf4(weight: Tensor, *, double_quant: bool, block_size: int) -> tuple[Tensor, Any]:
    """bitsandbytes' `quantize_4bit`, on a CPU piece by piece: it takes 30 bytes a weight while it works. Same bits."""
    functional = bitsandbytes().functional
    if weight.is_meta:  # bitsandbytes keeps its first codebook for good: it must have numbers
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    if weight.device.type != "cpu" or weight.numel() <= _PIECE:
        return functional.quantize_4bit(
            weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
        )
    done = [
        functional.quantize_4bit(piece, blocksize=block_size, quant_type="nf4")
        for piece in weight.reshape(-1).split(_PIECE)
    ]
    state = done[0][1]
    state.shape, state.absmax = weight.shape, torch.cat([of.absmax for _, of in done])
    if double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return torch.cat([payload for payload, _ in done]), state


def four_bit_from_bytes(
    layer: nn.Linear, tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> nn.Linear:
    """The `Linear4bit` in place of `layer` from the tensors of a saved one, bit for bit."""
    bias = tensors.get("bias")
    nested = "weight.nested_absmax" in tensors
    new = _empty(layer.in_features, layer.out_features, dtype, bias=bias is not None, double_quant=nested)
    constants = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    new.weight = bitsandbytes().nn.Params4bit.from_prequantized(tensors["weight"], constants, device=device, module=new)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(device), requires_grad=False)
    return new.train(layer.training)


def dequantize(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight of a 4-bit, 8-bit or plain layer in the layer's own shape, as numbers of `dtype`.

    A plain layer's own tensor is returned when it has that dtype already. The layer is not changed.
    """
    if isinstance(layer, Int8Linear):
        return layer.dense(dtype)
    foreign: Any = layer
    if is_four_bit(layer):
        data, state = foreign.weight.data, copy.copy(foreign.weight.quant_state)
        functional = bitsandbytes().functional
        if getattr(state, "packing_format_for_cpu", False):  # a layer of somebody else's that has run in eval mode
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.dtype = dtype
        return functional.dequantize_4bit(data, state)
    if _is(layer, "Linear8bitLt"):
        codes = foreign.weight.data if foreign.state.CB is None else foreign.state.CB
        scale = foreign.weight.SCB if foreign.state.SCB is None else foreign.state.SCB
        return (codes.float() * (scale / 127).unsqueeze(1)).to(dtype)
    return foreign.weight.detach().to(dtype)


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in 4 or 8 bits, by this room or by bitsandbytes."""
    return isinstance(layer, Int8Linear) or is_four_bit(layer) or _is(layer, "Linear8bitLt")


def is_four_bit(layer: nn.Module) -> bool:
    """Whether `layer` is a `Linear4bit`. Does not import bitsandbytes."""
    return _is(layer, "Linear4bit")


def _is(layer: nn.Module, kind: str) -> bool:
    package = sys.modules.get("bitsandbytes")  # never imported: then nothing can be one of its layers
    return package is not None and isinstance(layer, getattr(package.nn, kind))


def _empty(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool, double_quant: bool) -> Any:
    layer = bitsandbytes().nn.Linear4bit(
        inputs,
        outputs,
        bias=bias,
        compute_dtype=dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    # On CPUs with AVX512-BF16 an eval forward without gradients would rewrite the payload and round the constants to
    # bf16, for good, and fail on sizes that are no multiple of 32. A frozen backbone does neither.
    layer.support_avx512bf16_for_cpu = False
    return layer
