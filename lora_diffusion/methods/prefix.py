"""Prefix tuning: learned keys and values that the queries of an attention find beside its own tokens.

    y' = y + W_out · softmax(Q Kᵀ / √d) V        Q = W_q x as the attention has it; `k`, `v` (rank, heads · d) learned

Li & Liang 2021, arXiv 2101.00190, put them into the attention's one softmax, which mixes the base's output and this
second term in shares 1 - λ(x) and λ(x) (He et al. 2022, arXiv 2110.04366, eq. 7). Here, as in LLaMA-Adapter (Zhang et
al. 2023, arXiv 2303.16199) and IP-Adapter (Ye et al. 2023, arXiv 2308.06721), the softmaxes are apart, and V begins at
0: a fresh prefix changes nothing and a weight multiplies. Its tokens have no place, so that rotary embeddings leave
them alone. Where the text's tokens have queries beside the picture's, only the picture's see them. Not linear in the
input: no merging or baking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, product
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import core, is_attention, out_width
from lora_diffusion.lora import Part


class PrefixBranch(Branch):
    """`k`, `v`."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The second term above; `layer` is a whole attention, `x` (batch, tokens, width) what its queries are of."""
        attention: Any = layer
        by_head = (self.held[key].to(x.dtype).unflatten(-1, (attention.heads, -1)).transpose(0, 1) for key in "kv")
        keys, values = (rows.expand(len(x), -1, -1, -1) for rows in by_head)
        found = F.scaled_dot_product_attention(queries(attention, x), keys, values)
        return product(attention.to_out[0], found.transpose(1, 2).flatten(2))


def queries(attention: Any, x: Tensor) -> Tensor:
    """(batch, heads, tokens, d), normalised where the attention does, over a head or over all."""
    q, norm = attention.to_q.forward(x), getattr(attention, "norm_q", None)
    weight = getattr(norm, "weight", None)
    whole = weight is not None and weight.numel() == q.shape[-1]
    if norm is not None and whole:
        q = norm.forward(q)
    q = q.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    return q if norm is None or whole else norm.forward(q)


@dataclass(frozen=True)
class Prefix:
    """Settings of new layers: `rank`, how many keys and values each has."""

    rank: int = 16

    name: ClassVar[str] = "prefix"
    tensors: ClassVar[Mapping[str, bool]] = {"k": True, "v": True}
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"prefix: rank is {self.rank}, expected at least 1 learned token")

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Whole attentions of Diffusers that have an output layer of their own: targets "attention-blocks"."""
        return is_attention(layer)

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`k` normal with deviation 1, `v` zero."""
        width = out_width(core(layer))
        keys = torch.empty(self.rank, width).normal_(generator=generator)
        return LayerAdapter(self.name, {"k": keys, "v": torch.zeros(self.rank, width)})

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where both have a row for each token, as wide as the attention's queries."""
        shapes, width = [tuple(adapter.tensors[key].shape) for key in "kv"], out_width(core(layer))
        if shapes[0] == shapes[1] and len(shapes[0]) == 2 and shapes[0][0] and shapes[0][1] == width:
            return None
        return f"k {shapes[0]}, v {shapes[1]}; expected (n, {width}) twice"

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """1."""
        return 1.0

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return PrefixBranch(name, adapter.tensors)

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """ConfigError always."""
        raise ConfigError("method 'prefix' is not linear: no change of a weight says the same; keep it on a stack")
