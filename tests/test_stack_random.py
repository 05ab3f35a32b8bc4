"""Random histories of a stack on a U-Net and a transformer: it draws what a fresh stack draws, to the bit."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion import Adapter, AdapterStack, Region
from lora_diffusion.errors import LoraDiffusionError
from lora_diffusion.gates.fading import Fading
from lora_diffusion.methods import METHODS, new_method
from lora_diffusion.quantize import fingerprint
from lora_diffusion.targets import find_targets
from tests import tiny

KINDS = {"unet": tiny.unet, "transformer": tiny.transformer}
RARE = ("loha", "dora", "oft", "biased", "norm")
WEIGHTS: list[Any] = [0.0, 1.0, -0.5, 0.8, {"denoiser": 0.3}, "0.5@0,1@1", [0.7], [Region(torch.eye(8), 0.4)]]
WEIGHTS += [Region(torch.eye(8), "1@0,0@1"), Region(torch.eye(8))]
OPERATIONS = {
    "add": 6,
    "remove": 3,
    "weigh": 4,
    "swap": 5,
    "fail": 2,
    "fuse": 1,
    "unfuse": 2,
    "reserve": 1,
    "release": 1,
}
OPERATIONS |= {"cast": 1, "copy": 1, "copy_alone": 1, "drop": 1, "compose": 1}


class Pipe:
    """One denoiser."""

    def __init__(self, kind: str, model: nn.Module) -> None:
        self.kind, self.components = kind, {kind: model}

    def draw(self) -> Tensor:
        model = self.components[self.kind]
        with torch.no_grad():
            return tiny.predict(model, next(p for n, p in model.named_parameters() if "adapters" not in n).dtype)


def library(kind: str) -> list[Adapter]:
    model, made = KINDS[kind](), list[Adapter]()
    for number, method in enumerate(["lora"] * 5 + ["fading", *RARE]):
        generator, targets = torch.Generator().manual_seed(number), "norm" if method == "norm" else "attention"
        settings = new_method("lora" if method == "fading" else method, rank=2 + number % 2)
        found = find_targets(model, "all-linear" if method == "lora" and number else targets)
        layers = {n: settings.fresh(one, generator) for n, one in found.items() if METHODS[settings.name].supports(one)}
        for tensor in (t for one in layers.values() for t in one.tensors.values() if t.is_floating_point()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        metadata = Fading(1).metadata() if method == "fading" else {}
        made.append(Adapter(f"{method}{number}", {kind: layers}, metadata=metadata))
    return made


class History:
    """A stack, and what a fresh one would need to be the same."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.random, self.library = kind, random.Random(seed), library(kind)
        self.pristine = KINDS[kind]()
        self.pipe = Pipe(kind, copy.deepcopy(self.pristine))
        self.begin()

    def begin(self) -> None:
        self.stack = AdapterStack(self.pipe)
        self.held: dict[str, tuple[Adapter, Any]] = {}
        self.reserved: list[int] = []
        self.composition: dict[str, Any] = {}
        self.fused = self.rounded = False

    def step(self, operation: str) -> None:
        one, weight = self.random.choice(self.library), self.random.choice(WEIGHTS)
        some = self.random.choice(list(self.held) or ["nothing"])
        if operation == "add":
            self.stack.add(one, weight)
            self.held[one.name] = (one, weight)
        elif operation == "remove":
            self.stack.remove(some)
            del self.held[some]
        elif operation == "weigh":
            self.stack.weigh(some, weight)
            self.held[some] = (self.held[some][0], weight)
        elif operation == "swap":
            self.stack.swap(some, one)
            self.held = {one.name if n == some else n: (one, h[1]) if n == some else h for n, h in self.held.items()}
        elif operation == "fail":
            self.stack.add(Adapter("bad", {self.kind: {"nowhere": next(iter(one.layers[self.kind].values()))}}))
        elif operation in ("fuse", "unfuse"):
            getattr(self.stack, operation)()
            self.fused = operation == "fuse"
        elif operation == "reserve":
            self.stack.reserve(4, "attention")
            self.reserved.append(4)
        elif operation == "release":
            self.stack.release()
            self.reserved = []
        elif operation == "compose":
            self.composition = self.random.choice([{}, {"balance": True}, {"mode": "switch", "every": 1}])
            self.stack.compose(**self.composition)
        elif operation == "cast" and not self.fused:
            self.rounded = self.pristine.dtype == torch.bfloat16  # what is on now, until the next change
            for model in (self.pristine, self.pipe.components[self.kind]):
                model.to(torch.bfloat16 if not self.rounded else torch.float32)
        elif operation == "copy":
            before = (self.pipe, self.stack)
            self.pipe, self.stack = copy.deepcopy(before)
            before[1].clear()
            before[1].release()
            self.check_pristine(before[0])
        elif operation in ("copy_alone", "drop"):
            self.pipe = copy.deepcopy(self.pipe) if operation == "copy_alone" else self.pipe
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                del self.stack
                self.begin()
            self.check_pristine(self.pipe)
        self.rounded = self.rounded and operation not in ("add", "remove", "swap")

    def fresh(self) -> Tensor:
        stack = AdapterStack(pipe := Pipe(self.kind, copy.deepcopy(self.pristine)))
        for name in sorted(self.held) if self.composition.get("mode") is None else self.held:
            stack.add(*self.held[name])
        for rank in self.reserved:
            stack.reserve(rank, "attention")
        stack.compose(**self.composition)
        if self.fused:
            stack.fuse()
        return pipe.draw()

    def check_pristine(self, pipe: Pipe) -> None:
        model = pipe.components[self.kind]
        assert (str(model), fingerprint(model)) == (str(self.pristine), fingerprint(self.pristine))
        assert torch.equal(pipe.draw(), Pipe(self.kind, self.pristine).draw())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_history_draws_what_a_fresh_stack_draws(kind: str, seed: int) -> None:
    history, weights = History(kind, seed), list(OPERATIONS.values())
    for operation in history.random.choices(list(OPERATIONS), weights, k=16):
        try:
            history.step(operation)
        except LoraDiffusionError:
            assert operation != "copy_alone"
        if not history.rounded:
            assert torch.equal(history.pipe.draw(), history.fresh()), operation
    history.stack.clear()
    history.stack.release()
    history.check_pristine(history.pipe)
