"""Cost of a stack against diffusers + PEFT: forward, weights, swaps, adds, removal, fusing, NF4.

    python benchmarks/stacking.py                    # SD 1.5 and SDXL U-Nets with random weights; needs `peft`
    python benchmarks/stacking.py --small            # tiny U-Nets: does it run?

Writes stacking.json beside itself. Ratios count; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from timing import interleaved, write

from lora_diffusion import Adapter, AdapterStack, LoRA, save_adapter
from lora_diffusion.layers import is_linear
from lora_diffusion.merging.bake import to_quantise
from lora_diffusion.merging.survival import survival
from lora_diffusion.targets import find_targets

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}


class Bare:
    """A U-Net alone, as much of a pipeline as both sides need."""

    def __init__(self, kind: Any, config: dict[str, Any], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(**config).to(dtype).requires_grad_(False).eval()
        self.components = {"unet": self.unet}
        self.kind = kind

    def load(self, file: Path, name: str) -> None:
        """Load an adapter with diffusers + PEFT."""
        self.unet.load_lora_adapter(self.kind.lora_state_dict(str(file))[0], adapter_name=name, prefix="unet")


def adapters(unet: torch.nn.Module, count: int, rank: int, targets: str = "attention+ff") -> list[Adapter]:
    """Random rank-`rank` pairs in 16 bits on linear layers inside the transformer blocks."""
    found = {n: m for n, m in find_targets(unet, targets).items() if is_linear(m)}
    made = []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        layers = {n: LoRA(rank).fresh(layer, random) for n, layer in found.items()}
        for layer in layers.values():
            layer.tensors["up"].normal_(std=0.01, generator=random)
        made.append(Adapter(f"x{number}", {"unet": {n: layer.cast(torch.bfloat16) for n, layer in layers.items()}}))
    return made


def forward(config: dict[str, Any], side: int, counts: tuple[int, ...], rounds: int, rank: int) -> dict[str, Any]:
    """One denoiser call with none and with n adapters, ours and PEFT's, relative to none."""
    ours, peers = Bare(None, config, torch.bfloat16), Bare(StableDiffusionPipeline, config, torch.bfloat16)
    bare = Bare(None, config, torch.bfloat16)
    made, stack = adapters(ours.unet, max(counts), rank), AdapterStack(ours)
    width = config["cross_attention_dim"]
    given = (torch.randn(1, 4, side, side).bfloat16(), torch.tensor(10), torch.randn(1, 77, width).bfloat16())
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for count, adapter in enumerate(made, start=1):
            stack.add(adapter, 0.8)
            peers.load(save_adapter(adapter, Path(folder) / f"{adapter.name}.safetensors"), adapter.name)
            if count not in counts:
                continue
            peers.unet.set_adapters([a.name for a in made[:count]], [0.8] * count)
            cases = {
                name: lambda pipe=pipe: pipe.unet(*given)
                for name, pipe in (("none", bare), ("ours", ours), ("peft", peers))
            }
            times = interleaved(cases, rounds)
            ratios = {name: times[name]["median"] / times["none"]["median"] for name in ("ours", "peft")}
            results[f"{count} adapters"] = {"seconds": times, "relative": ratios}
    return results


def by_image(tokens: int, width: int, rank: int, rounds: int) -> dict[str, Any]:
    """One adapter an image in a batch of 8 on one linear layer, relative to the layer alone."""
    from peft import LoraConfig, inject_adapter_in_model

    from lora_diffusion.dial import Dial
    from lora_diffusion.gates import Resolved
    from lora_diffusion.lora import Slot, place
    from lora_diffusion.pairs import Pair

    plain, gated = torch.nn.Linear(width, width).bfloat16(), torch.nn.Linear(width, width).bfloat16()
    pairs = [Pair(str(i), torch.randn(rank, width), torch.randn(width, rank), 1.0) for i in range(8)]
    slot = Slot(gated, pairs)
    place(gated, slot)
    mixes = {str(i): Resolved(tuple(float(i == j) for j in range(8))) for i in range(8)}
    Dial("unet", gated, None).bind({"layer": slot}, mixes)
    peers: Any = torch.nn.Sequential(torch.nn.Linear(width, width))
    for i in range(8):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
        inject_adapter_in_model(config, peers, adapter_name=str(i))
    peers.bfloat16()
    x, names = torch.randn(8, tokens, width).bfloat16(), [str(i) for i in range(8)]
    cases = {
        "none": lambda: plain(x),
        "ours": lambda: gated(x),
        "peft, adapter_names": lambda: peers[0](x, adapter_names=names),
    }
    with torch.inference_mode():
        times = interleaved(cases, rounds)
    return {"seconds": times, "relative": {n: times[n]["median"] / times["none"]["median"] for n in times}}


def turning(config: dict[str, Any], rounds: int, rank: int) -> dict[str, Any]:
    """Weights, adds and removal on a large U-Net, seconds."""
    ours, peers = Bare(None, config, torch.bfloat16), Bare(StableDiffusionXLPipeline, config, torch.bfloat16)
    made, stack, toggle = adapters(ours.unet, 16, rank), AdapterStack(ours), [0.0]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [save_adapter(a, Path(folder) / f"{a.name}.safetensors") for a in made[:2]]
        for adapter, file in zip(made[:2], files, strict=True):
            stack.add(adapter)
            peers.load(file, adapter.name)

        def turn(change: Any) -> None:
            toggle[0] = 1.0 - toggle[0]
            change(["x0", "x1"], [toggle[0], 0.5 + toggle[0]])

        results["change all weights"] = interleaved(
            {
                "ours": lambda: turn(lambda names, weights: stack.weigh_all(dict(zip(names, weights, strict=True)))),
                "peft": lambda: turn(peers.unet.set_adapters),
            },
            rounds,
        )
    stack.clear()
    results |= coming_and_going(ours, made, rounds)
    return results


def swapping(config: dict[str, Any], rounds: int, rank: int, targets: str) -> dict[str, Any]:
    """To the next of seven residents, beside none and beside another adapter, and clearing, seconds.

    Where the next one's place among the rows is another, those of the adapter beside it move too.
    """
    ours, peers = Bare(None, config, torch.bfloat16), Bare(StableDiffusionXLPipeline, config, torch.bfloat16)
    made, stack = adapters(ours.unet, 8, rank, targets), AdapterStack(ours)
    results: dict[str, Any] = {"layers": len(made[0]), "megabytes": _bytes(made[0]) / 1e6}
    with tempfile.TemporaryDirectory() as folder:
        files = [save_adapter(a, Path(folder) / f"{a.name}.safetensors") for a in made[:2]]
        here = [1]

        def swap() -> None:
            following = here[0] % 7 + 1
            stack.swap(f"x{here[0]}", made[following])
            here[0] = following

        def hotswap() -> None:
            weights, _ = peers.kind.lora_state_dict(str(files[1]))
            peers.unet.load_lora_adapter(weights, adapter_name="x1", prefix="unet", hotswap=True)

        stack.add(made[1])
        peers.load(files[1], "x1")
        for label in ("swap", "swap beside another"):
            for _ in range(21):  # all are met, and their rows laid out
                swap()
            results[label] = interleaved({"ours": swap, "peft, hotswap": hotswap}, rounds)
            if len(stack) == 1:
                stack.add(made[0])
                peers.load(files[0], "x0")
        cleared, unloaded = list[float](), list[float]()
        for _ in range(rounds):
            cleared.append(once(stack.clear))
            unloaded.append(once(peers.unet.unload_lora))
            for number in range(2):
                stack.add(made[number])
                peers.load(files[number], f"x{number}")
    times = {"ours": cleared, "peft, unload_lora": unloaded}
    results["clear of 2"] = {
        n: {"median": statistics.median(t), "low": min(t), "high": max(t)} for n, t in times.items()
    }
    return results


def _bytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for *_, layer in adapter for tensor in layer.tensors.values())


def coming_and_going(pipe: Bare, made: list[Adapter], rounds: int) -> dict[str, Any]:
    """Adding sixteen files one after the other to an empty stack that has not met them, and taking all off."""
    adds: dict[str, list[float]] = {"2nd": [], "16th": []}
    cleared: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [save_adapter(a, Path(folder) / f"{a.name}.safetensors") for a in made]
        for _ in range(rounds):
            fresh = AdapterStack(pipe)
            for number, file in enumerate(files, start=1):
                seconds = once(lambda file=file, fresh=fresh: fresh.add(file))
                if label := {2: "2nd", 16: "16th"}.get(number):
                    adds[label].append(seconds)
            cleared.append(once(fresh.clear))
    medians = {label: statistics.median(times) for label, times in adds.items()}
    return {
        "add": {**medians, "all": adds, "16th over 2nd": medians["16th"] / medians["2nd"]},
        "clear of 16": {"median": statistics.median(cleared), "all": cleared},
    }


def once(case: Any) -> float:
    """Seconds of CPU time of one call that cannot be repeated as it is."""
    start = time.process_time()
    case()
    return time.process_time() - start


def fusing(config: dict[str, Any], rounds: int, rank: int) -> dict[str, Any]:
    """fuse + unfuse of four adapters, seconds; the weights must come back bit for bit."""
    from lora_diffusion.quantize import fingerprint

    pipe, peers = Bare(None, config, torch.bfloat16), Bare(StableDiffusionPipeline, config, torch.bfloat16)
    before, stack = fingerprint(pipe.unet), AdapterStack(pipe)
    with tempfile.TemporaryDirectory() as folder:
        for adapter in adapters(pipe.unet, 4, rank):
            stack.add(adapter)
            peers.load(save_adapter(adapter, Path(folder) / f"{adapter.name}.safetensors"), adapter.name)
    peers.unet.set_adapters(list(stack), [1.0] * 4)
    cases = {
        "fuse": stack.fuse,
        "unfuse": stack.unfuse,
        "peft, fuse": lambda: peers.unet.fuse_lora(adapter_names=list(stack)),
        "peft, unfuse": peers.unet.unfuse_lora,
    }
    times = interleaved(cases, rounds)
    return {"seconds": times, "bit-identical": fingerprint(pipe.unet) == before}


def kept_in_nf4(config: dict[str, Any], rank: int) -> dict[str, float]:
    """The share of a delta of |D| / |W| = 0.01 that survives baking into NF4, and its cosine (a stack: all)."""
    pipe = Bare(None, config, torch.float32)
    (adapter,) = adapters(pipe.unet, 1, rank)
    for name, layer in adapter.layers["unet"].items():
        up, down = layer.tensors["up"], layer.tensors["down"]
        weight = pipe.unet.get_submodule(name).weight
        up.mul_(0.01 * weight.norm() / (up @ down).norm())
    small, stack = to_quantise(pipe.unet), AdapterStack(pipe)
    stack.add(adapter)
    left = survival(pipe.unet, stack, small)
    return {"baked": left.share, "baked, cosine": left.cosine, "stacked": 1.0}


def main() -> None:
    """Everything, one after the other."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--small", action="store_true")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    sd15, sdxl, rank = (SMALL, SMALL, 2) if chosen.small else (SD15, SDXL, 16)
    sides = (16, 8) if chosen.small else (64, 32)
    results: dict[str, Any] = {"rounds": chosen.rounds}
    with contextlib.suppress(KeyboardInterrupt):  # what is there is written
        results["forward, large"] = forward(sd15, sides[0], (4, 8), chosen.rounds, rank)
        results["forward, small"] = forward(sd15, sides[1], (8,), chosen.rounds, rank)
        results["one adapter an image"] = by_image(1024, 640, 16, chosen.rounds)
        results["turning"] = turning(sdxl, chosen.rounds, rank)
        results["attention, 16 bits"] = swapping(sdxl, 3 * chosen.rounds, rank, "attention")
        results["attention+ff, 16 bits"] = swapping(sdxl, 3 * chosen.rounds, rank, "attention+ff")
        results["fuse and unfuse"] = fusing(sd15, chosen.rounds, rank)
        results["NF4"] = kept_in_nf4(sd15, rank)
    write(__file__, results)


if __name__ == "__main__":
    main()
