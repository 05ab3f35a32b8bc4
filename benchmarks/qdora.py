"""One training step of DoRA over NF4: ours keeps the norms of the weight, PEFT's dequantises it each time.

A stack of linear layers as wide as SD 1.5's largest, held in NF4 by bitsandbytes on both sides, the same factors and
magnitudes. A step is forward and backward. LoRA over the same layers shows what the magnitude costs; outputs are
compared before anything is timed.

    python benchmarks/qdora.py [--rounds 5] [--tokens 64]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from timing import interleaved, write
from torch import Tensor, nn

from lora_diffusion import LoRA, attach
from lora_diffusion.attachment import Attachment
from lora_diffusion.methods.dora import DoRA
from lora_diffusion.quantize import quantize

WIDTH, DEPTH, RANK = 1280, 4, 16
TARGETS = [str(number) for number in range(DEPTH)]


def backbone() -> nn.Sequential:
    """The layers in NF4, computing in float32."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))).to(device)
    quantize(model, "nf4", compute_dtype=torch.float32)
    return model


def peer(method: str) -> nn.Module:
    """PEFT's over the same layers."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, use_dora=method == "dora")
    return get_peft_model(backbone(), config)


def same_factors(theirs: nn.Module, ours: Attachment) -> None:
    """Random factors, alike on both sides."""
    for name, parameter in ours.named_parameters():
        layer, part = name.split(".")
        wrapped = theirs.base_model.model[int(layer)]  # type: ignore[index,union-attr]
        with torch.no_grad():
            if part == "magnitude":
                parameter.copy_(wrapped.lora_magnitude_vector["default"].weight)
                continue
            held = (wrapped.lora_A if part == "down" else wrapped.lora_B)["default"].weight
            held.normal_(std=0.02)
            parameter.copy_(held.reshape(parameter.shape) if held.shape == parameter.shape else held.t())


def step(model: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Forward and backward."""

    def one() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(x).square().mean().backward()

    return one


def main() -> None:
    """Compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], None]] = {}
    differences: dict[str, float] = {}
    for method, settings in (("dora", DoRA(RANK)), ("lora", LoRA(RANK))):
        ours, theirs = backbone(), peer(method)
        x = torch.randn(given.tokens, WIDTH, device=next(ours.parameters()).device)
        attachment = attach(ours, settings, TARGETS)
        same_factors(theirs, attachment)
        with torch.no_grad():
            wanted = theirs(x)
            differences[method] = ((ours(x) - wanted).norm() / wanted.norm()).item()
        cases[f"ours, {method}"] = step(ours, x, attachment.parameters())
        cases[f"PEFT, {method}"] = step(theirs, x, [p for p in theirs.parameters() if p.requires_grad])
    seconds = interleaved(cases, given.rounds)
    medians = {name: found["median"] for name, found in seconds.items()}
    results = {
        "layers": f"{DEPTH} linear layers of {WIDTH} by {WIDTH} in NF4, rank {RANK}, {given.tokens} tokens, float32",
        "seconds a step": seconds,
        "PEFT's DoRA over ours": medians["PEFT, dora"] / medians["ours, dora"],
        "what the magnitude adds to a step of LoRA": {
            side: medians[f"{side}, dora"] - medians[f"{side}, lora"] for side in ("ours", "PEFT")
        },
        "difference of outputs, relative": differences,
    }
    write(__file__, results)


if __name__ == "__main__":
    main()
