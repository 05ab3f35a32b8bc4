"""A training step rehearsed on the meta device: every operation runs, nothing is computed, every byte is counted.

The denoiser has its real layers, precision and slots; what autograd keeps, what a 4-bit layer unpacks for a moment
and what the optimiser holds come and go as in a real step, so that the peak is that of the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

__all__ = ["Rehearsal", "put_words_in"]

_aten: Any = torch.ops.aten


class Rehearsal(TorchDispatchMode):
    """While entered, counts the bytes of all tensors made since: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._attention: Any = None

    def __enter__(self) -> Rehearsal:
        # on the meta device torch's own would build the whole matrix, which the kernels of CPUs and GPUs do not
        self._attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _attend
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = self._attention

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.peak = max(self.peak, self.live)
        before = {id(_storage(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = _with_values(func, args, dict(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(_storage(leaf)) not in before:
                self._count(_storage(leaf))
        in_place = func is _aten.add.Tensor and _in_backward()  # gradients are added up so, if not under a mode
        if not in_place:
            self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, self._forget(key, size))
        self.live += size

    def _forget(self, key: int, size: int) -> Callable[[object], None]:
        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size

        return gone


def _with_values(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The operation itself, but what has values keeps them: how long captions are decides what is computed.

    Token ids, masks and positions stay on the CPU when they are to go to the meta device, and are copied there where
    they meet a tensor that is there. Whether a lost mask is all ones is answered with yes.
    """
    tensors = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
    if func is _aten._to_copy.default and named.get("device") is not None:
        named["device"] = tensors[0].device
        return func(*args, **named)
    if func.overloadpacket is _aten.arange and _is_meta(named.get("device")):
        named["device"] = "cpu"
    if func is _aten._local_scalar_dense.default and tensors[0].is_meta and tensors[0].dtype == torch.bool:
        return True
    if any(tensor.is_meta for tensor in tensors) and not all(tensor.is_meta for tensor in tensors):
        if func is _aten.index.Tensor:
            args = (args[0], [i for index in args[1] for i in _positions(index)])
        args, named = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, named))
    return func(*args, **named)


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """A mask's as indices, one a dimension, which have a length where the mask has values."""
    return [index] if index is None or index.is_meta or index.dtype != torch.bool else list(index.nonzero().unbind(1))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage], there is no public one


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def put_words_in(table: nn.Module, count: int) -> tuple[nn.Parameter, RemovableHandle]:
    """`count` trained vectors on the meta device, and the hook that puts them into what a table looks up."""
    rows = nn.Parameter(torch.empty(count, next(table.parameters()).shape[-1], device="meta"))

    def put_in(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.where(args[0][..., None] == 0, rows[0].to(out.dtype), out)

    return rows, table.register_forward_hook(put_in)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """Shapes only: keeps q, k, v, the mask, the output and one number a row, as FlashAttention (arXiv 2205.14135) does.

    The output lies token by token, as the kernels have it: heads are put side by side again without a copy.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        *batch, tokens, _ = query.shape
        out = query.new_empty(*batch[:-1], tokens, *batch[-1:], value.shape[-1])
        out = out.transpose(-3, -2) if batch else out
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
