"""New tokens learned with the adapter and saved inside it: pivotal tuning.

Their vectors begin as those of a word that means about the same and are trained beside the slots (Gal et al. 2022,
arXiv 2208.01618; together with LoRA: cloneofsimo/lora). The embedding table stays frozen: a hook puts the trained
vectors in place of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.errors import AdapterMismatchError, ConfigError, some
from lora_diffusion.pipelines import present
from lora_diffusion.tokens import Embeddings, Vocabulary
from lora_diffusion.training.batches import generator_for

_APART = 0.01  # of the table's standard deviation: how far several vectors of one token begin from each other


class Words:
    """Trained vectors of `tokens` (new token -> word it begins as) in text encoders of a pipeline."""

    def __init__(self, pipe: Any, encoders: Sequence[str], tokens: Mapping[str, str], vectors: int, seed: int) -> None:
        self.on, self.tokens, self.vectors = True, list(tokens), vectors
        self._vocabulary = Vocabulary(pipe)
        start = {
            token: {component: _start(pipe, component, word, vectors, seed) for component in encoders}
            for token, word in tokens.items()
        }
        self._vocabulary.check(start, (), "training")
        self._vocabulary.set([start])
        self.rows = {
            component: nn.Parameter(torch.cat([start[token][component] for token in tokens]).float())
            for component in encoders
        }
        self._hooks = [self._hook(pipe, component) for component in encoders]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("words/<component>", (tokens · vectors, width) float32)."""
        yield from ((f"words/{component}", rows) for component, rows in self.rows.items())

    def embeddings(self) -> dict[str, dict[str, Tensor]]:
        """Token -> component -> vectors (vectors, width), copies."""
        parts = {component: rows.detach().cpu().split(self.vectors) for component, rows in self.rows.items()}
        return {
            token: {component: found[number].clone() for component, found in parts.items()}
            for number, token in enumerate(self.tokens)
        }

    @torch.no_grad()
    def load(self, embeddings: Embeddings, who: str) -> None:
        """Go on from a file's vectors. AdapterMismatchError unless tokens, encoders and shapes are the same."""
        ours = self.embeddings()
        if _shapes(ours) != _shapes(embeddings):
            raise AdapterMismatchError(f"{who} has tokens {_shapes(embeddings)}, and this run trains {_shapes(ours)}")
        for component, rows in self.rows.items():
            rows.copy_(torch.cat([embeddings[token][component] for token in self.tokens]))

    def detach(self) -> None:
        """Tokenizers and tables are as they were."""
        for hook in self._hooks:
            hook.remove()
        self._vocabulary.set([])

    def _hook(self, pipe: Any, component: str) -> Any:
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        names = [t if i == 0 else f"{t}_{i}" for t in self.tokens for i in range(self.vectors)]
        table: nn.Module = getattr(pipe, component).get_input_embeddings()
        device = next(table.parameters()).device
        rows = self.rows[component]
        rows.data = rows.data.to(device)
        places = torch.tensor(tokenizer.convert_tokens_to_ids(names), device=device)

        def put_in(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not self.on:
                return out
            found = args[0][..., None] == places
            chosen = rows[found.long().argmax(-1)].to(out.dtype)
            return torch.where(found.any(-1, keepdim=True), chosen, out)

        return table.register_forward_hook(put_in)


def encoders_for_words(pipe: Any, names: Sequence[str]) -> list[str]:
    """Where new tokens go: into the CLIP encoders where there are any, else into all."""
    there = present(pipe, names)
    return [name for name in there if "CLIP" in type(getattr(pipe, name)).__name__] or there


def check_captions(tokens: Mapping[str, str], texts: Sequence[str]) -> None:
    """ConfigError for a token that no caption holds."""
    if unused := [token for token in tokens if not any(token in text for text in texts)]:
        raise ConfigError(f"text.tokens: no caption holds {some(unused)}; set data.trigger to it or write it in")


def _start(pipe: Any, component: str, word: str, vectors: int, seed: int) -> Tensor:
    """(vectors, width): the mean of the word's own vectors, several of them a little apart."""
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
    table: Tensor = getattr(pipe, component).get_input_embeddings().weight.detach().float().cpu()
    pieces = tokenizer(word, add_special_tokens=False).input_ids
    if not pieces:
        raise ConfigError(f"text.tokens: {word!r} is no word to begin as")
    mean = table[torch.tensor(pieces)].mean(0)
    noise = torch.randn(vectors, len(mean), generator=generator_for(seed, "words", component, word))
    return mean + (vectors > 1) * _APART * table.std() * noise


def _shapes(embeddings: Embeddings) -> dict[str, dict[str, tuple[int, ...]]]:
    return {token: {name: tuple(rows.shape) for name, rows in of.items()} for token, of in embeddings.items()}
