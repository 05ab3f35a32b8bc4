"""Serial bottleneck adapters: y' = y + s · (up · gelu(down · y + down_bias) + up_bias), y being the layer's output.

Houlsby et al. 2019, arXiv 1902.00751, which LoRA is always compared with. There they follow the attention's output and
the feed-forward: targets `["*.to_out.0", "*.ff.net.2"]`. `down` (rank, out), `up` (out, rank); on convolutions at every
pixel. Not linear in the input, so there is no change of a weight that says the same: no merging, fusing or baking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.branches import Branch, by_channel, pointwise
from lora_diffusion.errors import ConfigError
from lora_diffusion.layers import out_width
from lora_diffusion.lora import Part
from lora_diffusion.methods.ranked import Ranked, alpha_over, check_shapes


class BottleneckBranch(Branch):
    """`down`, `down_bias`, `up`, `up_bias`."""

    def change(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The formula above; it needs the frozen layer's output alone."""
        first, second = (by_channel(layer, self.held[key]).to(out.dtype) for key in ("down_bias", "up_bias"))
        hidden = F.gelu(pointwise(layer, out, self.held["down"]) + first)
        return self.scale * (pointwise(layer, hidden, self.held["up"]) + second)


@dataclass(frozen=True)
class Bottleneck(Ranked):
    """Settings of new layers: `rank`, the width inside, and `alpha`."""

    name: ClassVar[str] = "bottleneck"
    tensors: ClassVar[Mapping[str, bool]] = dict.fromkeys(("down", "down_bias", "up", "up_bias"), True)
    dense: ClassVar[bool] = False

    def fresh(self, layer: nn.Module, generator: torch.Generator | None = None) -> LayerAdapter:
        """`down` normal with deviation 0.01, cut at two of them, as in the paper; the others zero."""
        width = out_width(layer)
        down = torch.empty(self.rank, width)
        nn.init.trunc_normal_(down, std=0.01, a=-0.02, b=0.02, generator=generator)
        tensors = {
            "down": down,
            "down_bias": torch.zeros(self.rank),
            "up": torch.zeros(width, self.rank),
            "up_bias": torch.zeros(width),
        }
        return LayerAdapter(self.name, tensors, self.stored_alpha, "tensor")

    @staticmethod
    def check(adapter: LayerAdapter, layer: nn.Module) -> str | None:
        """None where all four fit the layer's output."""
        rank, width = adapter.tensors["down"].shape[0], out_width(layer)
        shapes = {"down": (rank, width), "down_bias": (rank,), "up": (width, rank), "up_bias": (width,)}
        return check_shapes(adapter, layer, shapes)

    @staticmethod
    def scale(adapter: LayerAdapter) -> float:
        """alpha / rank."""
        return alpha_over(adapter, adapter.tensors["down"].shape[0])

    @classmethod
    def part(cls, name: str, adapter: LayerAdapter, layer: nn.Module) -> Part:
        """The branch."""
        return BottleneckBranch(name, adapter.tensors, cls.scale(adapter))

    @classmethod
    def delta(cls, adapter: LayerAdapter, layer: nn.Module) -> Tensor:
        """ConfigError always."""
        raise ConfigError("method 'bottleneck' is not linear: no change of a weight says the same; keep it on a stack")
