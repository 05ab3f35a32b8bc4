"""LoRA: ΔW = (alpha / rank) · up · down, on linear layers and, as two convolutions, on convolutions.

Hu et al. 2021, arXiv 2106.09685; the convolution form is LoCon's (down keeps the kernel, up is 1x1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.layers import kernel_shape, out_width, weight_shape
from lora_diffusion.lora import Part
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_pair, kaiming, on_host
from lora_diffusion.methods.starts import Start, gaussian, olora, pissa
from lora_diffusion.pairs import Pair
from lora_diffusion.quantize import dequantize


@dataclass(frozen=True)
class LoRA(Ranked):
    """Settings of new LoRA layers: `rank` >= 1, `alpha` (None: the rank, so that the scale is 1).

    `init` is one of `starts.py`; PiSSA and OLoRA start with parts of the weight, which `attach` takes off again.
    `freeze_down` trains `up` alone, which keeps `rank` numbers a token for the backward pass instead of `in`:
    LoRA-FA, Zhang et al. 2023, arXiv 2308.03303.
    """

    init: Start = "kaiming"
    freeze_down: bool = False

    name: ClassVar[str] = "lora"
    tensors: ClassVar[Mapping[str, bool]] = {"down": True, "up": True}

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`down` and `up` as `init` says; "kaiming", with a = √5, is microsoft/LoRA's. Float32 on the CPU."""
        row = kernel_shape(layer)
        if self.begins_at_zero:
            draw = kaiming if self.init == "kaiming" else gaussian
            return self.of(layer, draw((self.rank, *row), generator), torch.zeros(self.rank, out_width(layer)).t())
        weight, scale = dequantize(layer).flatten(1), self.stored_alpha / self.rank
        return self.of(layer, *(pissa(weight, self.rank, scale) if self.init == "pissa" else olora(weight, self.rank)))

    def of(self, layer: nn.Module, down: Tensor, up: Tensor) -> LayerAdapter:
        """A new layer from its factors as matrices, (rank, in) and (out, rank)."""
        row = kernel_shape(layer)
        tensors = {"down": down.reshape(-1, *row), "up": up.reshape(*up.shape, *(1 for _ in row[1:]))}
        placed = {key: on_host(tensor) for key, tensor in tensors.items()}
        return LayerAdapter(self.name, placed, self.stored_alpha, "tensor")

    @property
    def begins_at_zero(self) -> bool:
        """Whether fresh layers change nothing."""
        return self.init in ("kaiming", "gaussian")

    @property
    def frozen(self) -> tuple[str, ...]:
        """Tensors that are not trained."""
        return ("down",) if self.freeze_down else ()

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where the pair fits the layer (linear pairs also come as 1x1 convolutions, and the reverse)."""
        return check_pair(adapter, layer)

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank; 1 where there is no alpha."""
        return alpha_over(adapter, adapter.tensors["down"].shape[0])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The pair, for linear layers and convolutions alike."""
        return cls.pair(name, adapter)

    @classmethod
    def pair(cls, name: str, adapter: LayerAdapter) -> Pair:
        """The pair to pack into a slot under an adapter's name."""
        return Pair(name, adapter.tensors["down"], adapter.tensors["up"], cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """scale · up · down in float32, in the shape of the layer's weight."""
        down, up = adapter.tensors["down"].float().flatten(1), adapter.tensors["up"].float().flatten(1)
        return (cls.scale(adapter) * (up @ down)).reshape(weight_shape(layer))
