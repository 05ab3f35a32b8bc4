"""What is cheap to make again is not kept: LayerNorm, GEGLU and modulation are computed once more in backward.

A trained `down` needs the input of its layer for its gradient, and that is mostly the outcome of a cheap function of
what autograd keeps for other gradients anyway:

    h ── layer_norm ── x ── to_q, to_k, to_v                 h is kept for the gradient of layer_norm
    h ── layer_norm ── · (1 + scale) + shift ── x            so in transformers; the rest has no tokens, it is small
    p ─┬─ a ─────── · ── x ── ff.net.2                       a and b lie in p, kept for the product and for gelu
       └─ b ─ gelu ─┘                                        gelu(b) is made again too

While a `Recompute` is entered, what comes of such a function carries a note of how: the function and its arguments, or
their notes. `keep` then gives those to be kept in place of the tensor. Backward calls the same functions with the same
arguments, so that gradients are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

__all__ = ["Made", "Recompute", "keep", "made_again", "unseen"]

_TOP_HOOKS: Any = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
_NOTE = "_lora_diffusion_note"  # attribute of a tensor that says how it was made
_KEPT_INPUT = (F.layer_norm, F.rms_norm, F.gelu, F.silu)  # keep their first argument, if that has a gradient
_PRODUCTS = (torch.mul, Tensor.mul)  # keep each factor, if the other one has a gradient
_OTHERS = (torch.add, Tensor.add, torch.cat, Tensor.to, Tensor.float)  # keep nothing
_WORTH = 2  # bytes that a note saves, over those that are kept only for it: less is not worth the time


class Recompute(TorchFunctionMode):
    """While entered, forward passes keep less for backward, with the same gradients to the bit.

        with Recompute():
            loss = step(model, batch)
        loss.backward()

    For the inputs of layers with a trained low-rank pair, and for products with something that can be made again. It
    leaves alone what runs without gradients, under autocast, compiled, or within checkpoints, which keep nothing.
    """

    def __enter__(self) -> Recompute:
        self._hooks = _saving_hooks()
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        run, named = _RUN.get(func), kwargs or {}
        if run is None or torch.compiler.is_compiling() or not torch.is_grad_enabled() or _casting():
            return func(*args, **named)
        return run(func, args, named) if _saving_hooks() == self._hooks else func(*args, **named)


class Made:
    """A function to be called again; tensors among its arguments are `Made` themselves or objects that stand for them.

    What comes of it is held from the first that asks for it in backward to the last.
    """

    __slots__ = ("args", "asked", "func", "held", "named")

    def __init__(self, func: Callable[..., Tensor], args: Sequence[Any], named: Mapping[str, Any]) -> None:
        self.func, self.args, self.named = func, args, named
        self.asked, self.held = 0, None  # how many will ask; what they get

    def ask(self) -> None:
        """Say, in forward, that there will be one more call of `again`."""
        self.asked += 1
        if self.asked == 1:
            _each(lambda one: one.ask() if isinstance(one, Made) else None, (self.args, self.named))

    def again(self, kept: Mapping[Any, Tensor]) -> Tensor:
        """The tensor, from what stands for each kept one to that one."""

        def tensor(one: Any) -> Any:
            return one.again(kept) if isinstance(one, Made) else kept[one] if isinstance(one, _Kept) else one

        out = self.held
        if out is None:
            out = self.func(*_each(tensor, self.args), **_each(tensor, self.named))
        self.asked -= 1
        self.held = out if self.asked > 0 else None
        return out


class _Kept:
    """Stands for a kept tensor, in what holds no tensors."""

    __slots__ = ()


@dataclass(frozen=True)
class _Note:
    """How a tensor was made, which it has as an attribute, and from what."""

    made: Made
    kept: dict[_Kept, Tensor]
    cost: int  # bytes of `kept` that nothing else keeps
    versions: tuple[int, ...]  # of the tensor itself and of `kept`: one that was written to since is another
    hooks: Any

    def holds(self, tensor: Tensor) -> bool:
        return self.versions == _versions(tensor, self.kept) and self.hooks == _saving_hooks()


def keep(tensor: Tensor) -> tuple[tuple[Made, tuple[_Kept, ...]] | None, list[Tensor]]:
    """How `made_again` gets `tensor` back in backward, and what is to be kept until then: itself, where it must be."""
    note = None if torch.compiler.is_compiling() else _note_of(tensor)
    if note is None:
        return None, [tensor]
    note.made.ask()
    return (note.made, tuple(note.kept)), list(note.kept.values())


def made_again(how: tuple[Made, tuple[_Kept, ...]] | None, kept: Sequence[Any]) -> Any:
    """What was given to `keep`, from the answers that it gave."""
    if how is None:
        return kept[0]
    made, stand_ins = how
    with torch.autocast(kept[0].device.type, enabled=False) if _casting() else nullcontext():
        return made.again(dict(zip(stand_ins, kept, strict=True)))


def unseen() -> AbstractContextManager[None]:
    """Where no `Recompute` looks at every operation and attribute, which takes microseconds each."""
    return torch._C.DisableTorchFunction()  # pyright: ignore[reportPrivateUsage, reportReturnType], no type says that it is one


class _Product(torch.autograd.Function):
    """a · b, of which what can be made again is not kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        for_a, for_b = ctx.needs_input_grad
        ctx.how_a, kept_a = keep(a) if for_b else (None, [None])
        ctx.how_b, kept_b = keep(b) if for_a else (None, [None])
        ctx.first = len(kept_a)
        ctx.save_for_backward(*kept_a, *kept_b)
        return a * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept = ctx.saved_tensors  # autograd itself adds up over what was broadcast
        a, b = made_again(ctx.how_a, kept[: ctx.first]), made_again(ctx.how_b, kept[ctx.first :])
        return None if b is None else grad * b, None if a is None else grad * a


def _of_kept_input(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    return _noted(func(*args, **named), func, args, named, [one for one in args[:1] if one.requires_grad])


def _product(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    if named or len(args) != 2 or not all(isinstance(one, Tensor) for one in args):
        return _of_made(func, args, named)
    a, b = args
    needed = [one for one, other in ((a, b), (b, a)) if other.requires_grad]  # for the gradient of the other
    spare = a.dtype == b.dtype and any(map(_note_of, needed))
    out = _Product.apply(a, b) if spare else func(a, b)
    return _noted(out, func, args, named, [one for one in needed if not (spare and _note_of(one))])


def _of_made(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    out = func(*args, **named)
    parts = args[0] if args and isinstance(args[0], list | tuple) else args
    known = any(isinstance(one, Tensor) and _note_of(one) for one in parts)
    return _noted(out, func, args, named, []) if known else out


_RUN: dict[Any, Callable[[Any, Sequence[Any], Mapping[str, Any]], Tensor]] = {
    **dict.fromkeys(_KEPT_INPUT, _of_kept_input),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_OTHERS, _of_made),
}


def _noted(out: Tensor, func: Any, args: Sequence[Any], named: Mapping[str, Any], kept: list[Tensor]) -> Tensor:
    """`out` with a note, unless too much would be kept only for it. `kept` is kept by autograd in any case."""
    if any(out is one for one in args):  # in place, or nothing to be done
        return out
    known: dict[_Kept, Tensor] = {}
    cost = 0

    def stand_in(one: Any) -> Any:
        nonlocal cost
        if not isinstance(one, Tensor):
            return one
        free = any(one is tensor for tensor in kept)
        if not free and (note := _note_of(one)):
            known.update(note.kept)
            cost += note.cost
            return note.made
        known[standing := _Kept()] = one
        cost += 0 if free or isinstance(one, nn.Parameter) else one.untyped_storage().nbytes()
        return standing

    made = Made(func, _each(stand_in, args), _each(stand_in, named))
    plain = all(type(one) in (Tensor, nn.Parameter) and not one.is_inference() for one in known.values())
    if plain and type(out) is Tensor and _WORTH * cost <= out.nbytes:
        setattr(out, _NOTE, _Note(made, known, cost, _versions(out, known), _saving_hooks()))
    return out


def _note_of(tensor: Tensor) -> _Note | None:
    note = getattr(tensor, _NOTE, None)
    return note if note is not None and note.holds(tensor) else None


def _versions(tensor: Tensor, kept: Mapping[_Kept, Tensor]) -> tuple[int, ...]:
    return (tensor._version, *(one._version for one in kept.values()))


def _each(change: Callable[[Any], Any], given: Any) -> Any:
    """`given` with all in its lists, tuples and dictionaries changed."""
    if isinstance(given, list | tuple):
        return [_each(change, one) for one in given]
    if isinstance(given, dict):
        return {name: _each(change, one) for name, one in given.items()}
    return change(given)


def _casting() -> bool:
    return torch._C._is_any_autocast_enabled()  # pyright: ignore[reportPrivateUsage], the public one wants a device


def _saving_hooks() -> Any:
    """Those that autograd hands what it keeps to, such as a checkpoint's."""
    return _TOP_HOOKS(False)
