"""Starts of LoRA layers that need more than the layer: the weights before quantising, or the data.

loftq   the factors take up what quantising lost; needs the weights as they were
eva     `down` spans the directions in which a layer's inputs vary most; needs a few batches to be run

Both give `attach(…, fresh=…)` its tensors. The formulas are in `methods/starts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import ConfigError, some
from lora_diffusion.layers import is_linear, out_width
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.methods.starts import eva, loftq
from lora_diffusion.quantize import dequantize, is_quantized


def loftq_start(
    layers: Mapping[str, nn.Module], methods: Mapping[str, LoRA], weights: Mapping[str, Tensor]
) -> dict[str, LayerAdapter]:
    """For every quantised layer: factors nearest to its error. `weights` has "<layer>.weight" as they were.

    The model then begins nearer to the one before quantising. Layers that were left whole get no start of this kind.
    ConfigError where none is quantised or a weight is missing.
    """
    packed = {name: layer for name, layer in layers.items() if is_quantized(layer)}
    if not packed:
        raise ConfigError("init 'loftq': no target layer is quantised, so there is no error to take up; use 'kaiming'")
    if missing := [name for name in packed if f"{name}.weight" not in weights]:
        raise ConfigError(f"init 'loftq': there is no original weight of {some(missing)}")
    starts: dict[str, LayerAdapter] = {}
    for name, layer in packed.items():
        method, now = methods[name], dequantize(layer)
        factors = loftq(weights[f"{name}.weight"].to(now), now, method.rank, method.stored_alpha / method.rank)
        starts[name] = method.of(layer, *factors)
    return starts


def eva_start(
    layers: Mapping[str, nn.Module], methods: Mapping[str, LoRA], run: Callable[[], object]
) -> dict[str, LayerAdapter]:
    """For every linear layer: `down` from the inputs that it sees while `run()` runs the model, `up` zero.

    The rank stays as it is (the paper's redistribution over layers is not done). ConfigError for a layer that saw
    nothing.
    """
    linear = {name: layer for name, layer in layers.items() if is_linear(layer)}
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().flatten(0, -2).float()
            moments[name] = moments.get(name, torch.zeros((), device=rows.device)) + rows.t() @ rows

        return note

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [name for name in linear if name not in moments]:
        raise ConfigError(f"init 'eva': {some(unseen)} saw no input; train another set of layers")
    return {
        name: methods[name].of(
            layer, eva(moments[name], methods[name].rank), torch.zeros(out_width(layer), methods[name].rank)
        )
        for name, layer in linear.items()
    }
