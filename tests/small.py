"""A denoiser of three layers, as much of a pipeline as a stack needs, and adapters for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion import Adapter, LayerAdapter, LoRA
from lora_diffusion.targets import find_targets


class Small(nn.Module):
    """A denoiser of two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 12)})])
        self.mid_block = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3, padding=1)})
        self.up_blocks = nn.ModuleList([nn.ModuleDict({"to_out": nn.Linear(12, 5)})])
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mid_block["conv"](x).flatten(2).transpose(1, 2)
        return self.up_blocks[0]["to_out"](self.down_blocks[0]["to_q"](tokens).relu())


class Pipe:
    """As much of a pipeline as a stack needs."""

    def __init__(self) -> None:
        self.unet = Small()

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet}


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def small_adapter(name: str, rank: int, seed: int, fault: str = "") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    found = find_targets(Small(), "all-linear+conv")
    layers = {n: LoRA(rank).fresh(layer, generator) for n, layer in found.items()}
    for new in layers.values():
        new.tensors["up"].normal_(generator=generator)
    last = layers["up_blocks.0.to_out"]
    if fault == "shape":
        layers["up_blocks.0.to_out"] = LayerAdapter("lora", {**last.tensors, "up": torch.ones(4, rank)}, 1.0)
    if fault == "nan":
        last.tensors["down"].fill_(float("nan"))
    if fault == "name":
        layers["nowhere"] = layers.pop("up_blocks.0.to_out")
    return Adapter(name, {"unet": layers})


ADAPTERS = {
    "a": small_adapter("a", 2, 1),
    "training": small_adapter("training", 3, 2),
    "c.v1": small_adapter("c.v1", 1, 3),
}
