"""Reading, resolving and attaching an SDXL adapter: ours against `pipe.load_lora_weights`, in one run.

An adapter of 722 U-Net layers in kohya's spelling (2,166 tensors, rank 16, bfloat16, 85 MB), on a real-size U-Net
whose weights are allocated and never touched. Both sides alternate; a side's time runs from the file's path to
layers that are on the model, and what was attached comes off between. Ours is timed twice: with a stack that is new
and has met no file ("lora_diffusion", which counts), and with one that has ("known file").

    python benchmarks/load.py [--repeats 5] [--out benchmarks/load.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn

from lora_diffusion import Adapter, AdapterStack, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.families.original import original
from lora_diffusion.families.skeletons import skeleton
from lora_diffusion.layers import is_convolution, is_linear, kernel_shape, out_width

RANK = 16


def pipeline() -> StableDiffusionXLPipeline:
    """SDXL's U-Net and text encoders at real size, in memory that is never touched."""
    models = {
        name: model.to_empty(device="cpu").to(torch.bfloat16) if name != "unet" else model
        for name, model in skeleton("Stable Diffusion XL").items()
    }
    models["unet"] = models["unet"].to(torch.bfloat16).to_empty(device="cpu")
    parts = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(**parts, **models, scheduler=EulerDiscreteScheduler())
    for model in models.values():
        model.requires_grad_(requires_grad=False)
    return pipe


def adapter(unet: nn.Module) -> Adapter:
    """Every layer that the real key list has: projections, attentions and feed-forwards of all attention blocks."""
    layers: dict[str, LayerAdapter] = {}
    for name, layer in unet.named_modules():
        if ".attentions." in name and (is_linear(layer) or is_convolution(layer)):
            row, width = kernel_shape(layer), out_width(layer)
            down = torch.randn(RANK, *row, dtype=torch.bfloat16) * 0.01
            layers[name] = LayerAdapter("lora", {"down": down, "up": torch.randn(width, RANK).bfloat16() * 0.01}, 4.0)
    return Adapter("bench", {"unet": layers})


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of `work`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(pipe: StableDiffusionXLPipeline, path: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each side, alternating, after one round that warms both up."""
    known, new = AdapterStack(pipe), list[AdapterStack]()

    def put_on_new() -> None:
        new.append(AdapterStack(pipe))
        new[-1].add(path, name="a")

    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "lora_diffusion": (put_on_new, lambda: new.pop().clear()),
        "diffusers": (lambda: pipe.load_lora_weights(str(path), adapter_name="a"), pipe.unload_lora_weights),
        "known file": (lambda: known.add(path, name="a"), known.clear),
        "read only": (lambda: load_adapter(path), lambda: None),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for round_number in range(repeats + 1):
        for name, (put_on, take_off) in sides.items():
            spent = timed(put_on)
            take_off()
            if round_number:
                seconds[name].append(spent)
    return {
        name: {
            "wall_s": round(statistics.median(wall for wall, _ in spent), 4),
            "cpu_s": round(statistics.median(cpu for _, cpu in spent), 4),
            "all_wall_s": [round(wall, 4) for wall, _ in spent],
        }
        for name, spent in seconds.items()
    }


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = pipeline()
    with tempfile.TemporaryDirectory() as folder:
        renamed = original(adapter(pipe.unet), {"unet": pipe.unet})
        path = save_adapter(renamed, Path(folder) / "sdxl.safetensors", format="kohya")
        result: dict[str, Any] = {
            "layers": len(renamed),
            "tensors": 3 * len(renamed),
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "device": "cpu",
            **measure(pipe, path, options.repeats),
        }
    result["times_faster"] = round(result["diffusers"]["wall_s"] / result["lora_diffusion"]["wall_s"], 1)
    result["times_faster_cpu"] = round(result["diffusers"]["cpu_s"] / result["lora_diffusion"]["cpu_s"], 1)
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
