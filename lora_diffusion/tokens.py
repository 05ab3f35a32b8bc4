"""Learned tokens on a pipeline: tokenizer and text encoder are extended while adapters that carry them are on.

Tokenizers are copied, embedding tables enlarged; the originals are kept and come back as they were. A token of n
vectors becomes `<t>`, `<t>_1`, … as Diffusers' textual inversion spells it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import is_finite
from lora_diffusion.errors import AdapterMismatchError, TargetError, some

Embeddings = Mapping[str, Mapping[str, Tensor]]  # token -> component -> (n, width)


_OWN = "_own_vocabulary"  # on a text encoder with learned tokens: its tokenizer and table as they were


def own_vocabulary(encoder: nn.Module) -> tuple[Any, Any] | None:
    """Tokenizer and embedding weight that a text encoder had before the tokens that are on it came."""
    return vars(encoder).get(_OWN)


class Vocabulary:
    """The pristine tokenizers and embedding tables of a pipeline, and what is added to them."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.kept: dict[str, tuple[Any, Any]] = {}  # component -> tokenizer, embedding weight

    def check(self, embeddings: Embeddings, others: Iterable[Embeddings], adapter: str) -> None:
        """AdapterMismatchError where a token has no text encoder, another width, or is known already.

        TargetError where another stack's tokens are on the encoder.
        """
        taken = {spelled for other in others for token, of in other.items() for spelled in _all_spelled(token, of)}
        for token, vectors in embeddings.items():
            spelled = _all_spelled(token, vectors)
            for component, rows in vectors.items():
                encoder = getattr(self.pipe, component, None)
                tokenizer = self.kept[component][0] if component in self.kept else self._tokenizer(component)
                if not isinstance(encoder, nn.Module) or tokenizer is None:
                    raise AdapterMismatchError(f"adapter {adapter!r}: token {token!r}: there is no {component}")
                if own_vocabulary(_inner(encoder)) is not self.kept.get(component):
                    why = f"{component} has learned tokens of another stack; add to that stack, or clear it first"
                    raise TargetError(f"adapter {adapter!r}: token {token!r}: {why}")
                width = _table(encoder).weight.shape[1]
                if rows.shape[-1] != width:
                    found = f"vectors are {rows.shape[-1]} wide, {component} is {width}"
                    raise AdapterMismatchError(f"adapter {adapter!r}: token {token!r}: {found}; another model family")
                if not is_finite(rows):
                    raise AdapterMismatchError(f"adapter {adapter!r}: token {token!r} of {component} is not finite")
                vocabulary = tokenizer.get_vocab()
                if known := [one for one in spelled if one in taken or one in vocabulary]:
                    raise AdapterMismatchError(f"adapter {adapter!r}: token {some(known)} is known already")
            taken |= set(spelled)

    def set(self, all_embeddings: Iterable[Embeddings]) -> None:
        """Have exactly these tokens beside the pipeline's own."""
        self.restore(self.kept)
        self.kept = {}
        wanted: dict[str, dict[str, Tensor]] = {}
        for embeddings in all_embeddings:
            for token, vectors in embeddings.items():
                for component, rows in vectors.items():
                    wanted.setdefault(component, {})[token] = rows
        for component, tokens in wanted.items():
            self._extend(component, tokens)

    def _extend(self, component: str, tokens: Mapping[str, Tensor]) -> None:
        tokenizer, table = self._tokenizer(component), _table(getattr(self.pipe, component))
        vars(_inner(getattr(self.pipe, component)))[_OWN] = self.kept[component] = (tokenizer, table.weight)
        longer = copy.deepcopy(tokenizer)
        names = [name for token, rows in tokens.items() for name in _spelled(token, len(rows))]
        longer.add_tokens(names)
        places = longer.convert_tokens_to_ids(names)
        old = table.weight
        weight = old.new_zeros(max(len(old), max(places) + 1), old.shape[1])
        weight[: len(old)] = old.data
        weight[places] = torch.cat(list(tokens.values())).to(weight)
        table.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        _resize(getattr(self.pipe, component), weight)
        setattr(self.pipe, _tokenizer_name(component), longer)

    def restore(self, components: Iterable[str]) -> None:
        """Bring tokenizers and embedding weights of these components back."""
        for component in components:
            encoder = getattr(self.pipe, component)
            tokenizer, weight = vars(_inner(encoder)).pop(_OWN)
            weight.data = weight.data.to(_table(encoder).weight)  # it may have been moved or cast in between
            _table(encoder).weight = weight
            _resize(encoder, weight)
            setattr(self.pipe, _tokenizer_name(component), tokenizer)

    def restore_left(self, component: str, pipe: Any) -> None:
        """The same for tokens that a stack left, and on another pipeline with the same encoder, if that has one."""
        encoder = getattr(self.pipe, component, None)
        if encoder is None or (own := own_vocabulary(_inner(encoder))) is None or own is self.kept.get(component):
            return
        self.restore([component])
        theirs = getattr(pipe, component, None)
        if pipe is not self.pipe and theirs is not None and _inner(theirs) is _inner(encoder):
            setattr(pipe, _tokenizer_name(component), own[0])

    def _tokenizer(self, component: str) -> Any:
        return getattr(self.pipe, _tokenizer_name(component), None)


def _spelled(token: str, count: int) -> list[str]:
    """What a token of `count` vectors is called in a tokenizer, vector by vector."""
    return [token if i == 0 else f"{token}_{i}" for i in range(count)]


def _all_spelled(token: str, vectors: Mapping[str, Tensor]) -> list[str]:
    return _spelled(token, max(map(len, vectors.values()), default=0))


def _tokenizer_name(component: str) -> str:
    return component.replace("text_encoder", "tokenizer")


def _resize(encoder: Any, weight: Tensor) -> None:
    _table(encoder).num_embeddings = len(weight)
    encoder.config.vocab_size = len(weight)  # so that what is saved can be opened


def _inner(encoder: Any) -> Any:
    return getattr(encoder, "_orig_mod", encoder)


def _table(encoder: Any) -> nn.Embedding:
    table = _inner(encoder).get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table
