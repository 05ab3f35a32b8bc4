"""Cost of training a LoRA against PEFT: the step, the activations kept for it, one layer over NF4, attaching.

    python benchmarks/training.py                    # SD 1.5 and SDXL U-Nets with random weights; needs `peft`
    python benchmarks/training.py --small            # tiny U-Nets: does it run?

Step and bytes: U-Net in bf16, adapters in float32 of rank 16 on attention and feed-forward, latents of 32x32, batch 1;
"frozen" is the forward and backward pass of the U-Net without adapters, with a gradient for its input. Bytes are those
of all tensors that autograd keeps, each storage once, parameters left out. Writes training.json beside itself. Ratios
count; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from diffusers import UNet2DConditionModel
from stacking import SD15, SDXL, SMALL
from timing import interleaved, write
from torch import Tensor, nn

from lora_diffusion import LoRA, Recompute, attach
from lora_diffusion.quantize import quantize
from lora_diffusion.targets import find_targets

PEERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]  # what "attention+ff" is in PEFT's words


@cache
def frozen(width: int) -> Any:
    """A U-Net with random weights in bf16, whose weights all subjects of that cross-attention width share."""
    torch.manual_seed(0)
    config = next(config for config in (SD15, SMALL) if config["cross_attention_dim"] == width)
    return UNet2DConditionModel(**config).to(torch.bfloat16).requires_grad_(False)


class Subject:
    """A frozen U-Net, with adapters or without, and one step of it."""

    def __init__(self, config: dict[str, Any], side: int, who: str, rank: int, dropout: float = 0.0) -> None:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel(**config)
        unet.load_state_dict(frozen(config["cross_attention_dim"]).state_dict(), assign=True)
        unet.requires_grad_(False)
        torch.manual_seed(0)
        self.who, self.unet = who, unet.train() if dropout else unet
        if who.startswith("ours"):
            attached = attach(unet, LoRA(rank), "attention+ff", component="unet", dropout=dropout)
            for slot in attached.slots.values():
                slot.train()
            self.parameters = attached.parameters()
        elif who.startswith("peft"):
            from peft import LoraConfig

            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=PEERS, lora_dropout=dropout))
            self.parameters = [p for p in unet.parameters() if p.requires_grad]
            for parameter in self.parameters:
                parameter.data = parameter.data.float()
        else:
            self.parameters = []
        width = config["cross_attention_dim"]
        self.given = torch.randn(1, 4, side, side).bfloat16(), torch.tensor(10), torch.randn(1, 77, width).bfloat16()

    def step(self) -> None:
        """Forward and backward."""
        latents, time, states = self.given
        cast = torch.autocast("cpu", torch.bfloat16) if "autocast" in self.who else contextlib.nullcontext()
        with cast, Recompute() if "recomputed" in self.who else contextlib.nullcontext():
            answer = self.unet(latents.detach().requires_grad_(not self.parameters), time, states).sample
        answer.float().square().mean().backward()
        for parameter in self.parameters:
            parameter.grad = None

    def kept(self) -> int:
        """Bytes that autograd keeps from forward to backward."""
        known = {p.untyped_storage().data_ptr() for p in self.unet.parameters()}
        storages: dict[int, int] = {}
        held: list[Tensor] = []  # or a storage that is let go would give its address to another

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.step()
        return sum(storages.values())


def steps(config: dict[str, Any], side: int, rounds: int, rank: int) -> dict[str, Any]:
    """Seconds of a step, and over the frozen U-Net's."""
    names = ("frozen", "ours", "ours, recomputed", "peft", "ours, autocast", "peft, autocast")
    subjects = {name: Subject(config, side, name, rank) for name in names}
    times = interleaved({name: subject.step for name, subject in subjects.items()}, rounds)
    relative = {n: times[n]["median"] / times["frozen"]["median"] for n in names[1:]}
    return {"rounds": rounds, "seconds": times, "relative": relative}


def bytes_kept(config: dict[str, Any], side: int, rank: int) -> dict[str, Any]:
    """Megabytes (10^6) that autograd keeps, and how many of them are there because of the adapters."""
    frozen = Subject(config, side, "frozen", rank).kept()
    results: dict[str, Any] = {"frozen": frozen / 1e6}
    for name in ("ours", "ours, recomputed", "peft", "peft, autocast"):
        for dropout in (0.0, 0.1):
            total = Subject(config, side, name, rank, dropout).kept()
            label = f"{name}, dropout" if dropout else name
            results[label] = {"total": total / 1e6, "for it": (total - frozen) / 1e6, "relative": total / frozen}
    return results


def nf4_layer(tokens: int, width: int, rounds: int, rank: int) -> dict[str, Any]:
    """Forward and backward of one NF4 layer that computes in bf16, over the frozen layer."""
    from peft import LoraConfig, inject_adapter_in_model

    def layer() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width, bias=False))
        quantize(model, "nf4", compute_dtype=torch.bfloat16)
        assert isinstance(model[0], Linear4bit)
        return model

    ours, peer = layer(), layer()
    attached = attach(ours, LoRA(rank), "*", component="unet")
    for slot in attached.slots.values():
        slot.train()
    peer.is_loaded_in_4bit = True  # type: ignore[assignment]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]), peer)
    x = torch.randn(1, tokens, width).bfloat16()

    def step(model: nn.Module, *, autocast: bool = False) -> Callable[[], None]:
        def once() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(x.detach().requires_grad_())
            out.backward(x)
            for parameter in model.parameters():
                parameter.grad = None

        return once

    cases = {"frozen": step(layer()), "ours": step(ours), "peft": step(peer)}
    cases |= {"peft, autocast": step(peer, autocast=True), "ours, autocast": step(ours, autocast=True)}
    times = interleaved(cases, rounds)
    return {"seconds": times, "relative": {n: times[n]["median"] / times["frozen"]["median"] for n in cases}}


def attaching(config: dict[str, Any], rounds: int, rank: int) -> dict[str, Any]:
    """Seconds to put fresh slots on all linear layers, and to take them off again.

    PEFT gets a U-Net without its wrappers every time: they stay when its adapter is deleted. Weights are never touched.
    """
    from peft import LoraConfig

    with torch.device("meta"):
        bare: Any = UNet2DConditionModel(**config).to(torch.bfloat16).requires_grad_(False)
    unet = copy.deepcopy(bare).to_empty(device="cpu")
    names = [name for name, layer in find_targets(unet, "all-linear").items() if isinstance(layer, nn.Linear)]
    found: list[Any] = []

    cases = {
        "ours": lambda: found.append(attach(unet, LoRA(rank), "all-linear", component="unet")),
        "off": lambda: found.pop().detach(),
        "for peft": lambda: found.append(copy.deepcopy(bare).to_empty(device="cpu")),
        "peft": lambda: found[0].add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names)),
        "peft off": lambda: found.pop().delete_adapters("default"),
    }
    return {"layers": len(names), "seconds": interleaved(cases, rounds)}


def main() -> None:
    """Everything, one after the other."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--small", action="store_true")
    options.add_argument("--rounds", type=int, default=7)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    sd15, sdxl, side, rank = (SMALL, SMALL, 8, 2) if chosen.small else (SD15, SDXL, 32, 16)
    results: dict[str, Any] = {"rounds": chosen.rounds}
    with contextlib.suppress(KeyboardInterrupt):  # what is there is written
        results["bytes kept"] = bytes_kept(sd15, side, rank)
        results["NF4 layer"] = nf4_layer(1024, 640, 3 * chosen.rounds, rank)
        results["attach"] = attaching(sdxl, chosen.rounds, rank)
        results["step"] = steps(sd15, side, chosen.rounds, rank)
    write(__file__, results)


if __name__ == "__main__":
    main()
