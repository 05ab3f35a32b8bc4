"""The bytes of a frozen model: which there are, how many, and a fingerprint of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "frozen_modules", "own_tensors", "tie", "ties", "weight_bytes"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantisation constants; what is shared counts once (but on meta)."""
    tensors = [tensor for _, module in frozen_modules(model) for _, tensor in own_tensors(module)]
    real = {(t.device, t.data_ptr(), t.nbytes): t.nbytes for t in tensors if not t.is_meta}
    return sum(real.values()) + sum(t.nbytes for t in tensors if t.is_meta)


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


def ties(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names for one and the same parameter, the first name always first."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    return [(kept, name) for name, p in named if (kept := first.setdefault(id(p), name)) != name]


def tie(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Let both names of each pair mean one parameter again: the one that is not on the meta device."""
    for pair in pairs:
        filled = next((name for name in pair if not model.get_parameter(name).is_meta), pair[0])
        for name in pair:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, model.get_parameter(filled))
