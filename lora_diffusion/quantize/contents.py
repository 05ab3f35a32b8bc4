"""The bytes of a frozen model: which there are, how many, and a fingerprint of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "frozen_modules", "own_tensors", "weight_bytes"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantisation constants; what is shared counts once."""
    tensors = (tensor for _, module in frozen_modules(model) for _, tensor in own_tensors(module))
    return sum({(tensor.device, tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every byte of the frozen model: parameters, buffers, 4-bit payloads and their constants.

    Child modules named `adapters` are left out, so that the value is the same before, during and after training.
    """
    digest = hashlib.sha256()
    for prefix, module in frozen_modules(model):
        for name, tensor in own_tensors(module):
            digest.update(f"{prefix}.{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(content.numpy().data)
    return digest.hexdigest()


def frozen_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything but the child modules named `adapters`."""
    return ((name, module) for name, module in model.named_modules() if "adapters" not in name.split("."))


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module without its children: parameters, buffers, 4-bit constants."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, tensor.data
    state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return
    constants: dict[str, Tensor | None] = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
    if state.nested:
        constants |= {"state2.absmax": state.state2.absmax, "state2.code": state.state2.code}
    yield from ((f"weight.{name}", tensor) for name, tensor in constants.items() if tensor is not None)
