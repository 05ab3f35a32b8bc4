"""A training run that can stop at any moment and go on with the same command.

State (weights, moving average, optimiser, sample count) goes into one file, written beside the old one
and renamed over it. Under `torchrun --nproc-per-node N` each process takes 1/N of every batch and the
gradients are averaged: on a busy CPU that is faster than N threads, which wait for each other in every product.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

AVERAGED = 32_000  # samples: the moving average's horizon


Rate = Callable[[int], float]  # samples seen -> factor on the learning rate


def cosine(samples: int) -> Rate:
    """Up over the first 2 %, then down by a cosine to 2 % at the end: the end must be known at the start."""

    def factor(seen: int) -> float:
        done = seen / samples
        return min(1.0, (done + 1e-4) / 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    return factor


def steady(samples: int, cool: int = 0, warm: int = 3200) -> Rate:
    """Up over `warm` samples, then 1, then straight down over the last `cool` of `samples`.

    Until the cooling begins nothing depends on `samples`, so a run can be prolonged at will.
    """

    def factor(seen: int) -> float:
        rest = (samples - seen) / cool if cool else 1.0
        return min(1.0, (seen + 1) / warm, max(rest, 0.01))

    return factor


class Run:
    """Trains `model` until `samples` have been seen, saving every `every` seconds.

    `rate` scales `lr` by the samples seen. `budget` (seconds) and Ctrl-C (or SIGTERM) only decide when
    this call stops; they never change what is learned. `averaged` is the moving average's horizon in samples.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        *,
        lr: float,
        samples: int,
        batch: int,
        rate: Rate,
        averaged: int = AVERAGED,
        seed: int = 0,
    ) -> None:
        self.averaged = averaged
        self.path, self.model, self.lr, self.samples, self.batch, self.rate = path, model, lr, samples, batch, rate
        self.seen = 0
        self.seconds = 0.0
        self.rank, self.processes = _join()
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
        if path.exists():
            self._restore()
        # A resumed run goes on with other draws than an uninterrupted one: as good, and nothing to store.
        self.random = torch.Generator().manual_seed(seed + 1009 * self.rank + 65_537 * self.seen)

    def train(self, loss_of: Callable[[int, torch.Generator], Tensor], budget: float, every: float = 120) -> bool:
        """`loss_of(batch, generator)` once a step; True when all samples have been seen."""
        with _stop_signals() as stops:
            self._train(loss_of, lambda spent: bool(stops) or spent > budget, every)
        return self.seen >= self.samples

    def _train(
        self, loss_of: Callable[[int, torch.Generator], Tensor], ends: Callable[[float], bool], every: float
    ) -> None:
        start = saved = told = time.monotonic()
        recent: list[float] = []
        stop = False
        while self.seen < self.samples and not stop:
            loss, stop = self._step(loss_of, ends(time.monotonic() - start))
            recent.append(loss)
            now = time.monotonic()
            if len(recent) == 50:
                self._tell(recent, now - told)
                recent, told = [], now
            if now - saved > every or stop or self.seen >= self.samples:
                self.seconds += now - saved
                saved = now
                self.save()

    def _step(self, loss_of: Callable[[int, torch.Generator], Tensor], stop: bool) -> tuple[float, bool]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.rate(self.seen)
        loss = loss_of(self.batch // self.processes, self.random)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        signs = loss.detach().new_tensor([loss.item(), float(stop)])
        if self.processes > 1:
            _average([p.grad for p in self.model.parameters() if p.grad is not None] + [signs], self.processes)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._follow()
        self.seen += self.batch
        return signs[0].item(), signs[1].item() > 0

    def _tell(self, losses: list[float], seconds: float) -> None:
        mean, speed = sum(losses) / len(losses), len(losses) * self.batch / seconds
        rate = self.lr * self.rate(self.seen)
        if self.rank == 0:
            print(f"{self.seen:8d}/{self.samples} loss {mean:.4f} lr {rate:.2e} {speed:.0f}/s", flush=True)

    def save(self) -> None:
        """Write the state atomically (the first process does)."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "seen": self.seen,
            "seconds": self.seconds,
        }
        draft = self.path.with_suffix(".part")
        torch.save(state, draft)
        draft.replace(self.path)

    def use_average(self) -> None:
        """Put the moving average into the model (at the end, for export)."""
        self.model.load_state_dict(self.average)

    def _restore(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.average = {name: value.to(self.average[name].device) for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen, self.seconds = state["seen"], state["seconds"]
        print(f"resumed {self.path.name} at {self.seen} samples", flush=True)

    @torch.no_grad()
    def _follow(self) -> None:
        steps = self.seen / self.batch
        decay = min(1 - self.batch / self.averaged, (1 + steps) / (10 + steps))
        ours = self.model.state_dict()
        floats = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in floats], [ours[n] for n in floats], 1 - decay)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a step is never cut in two."""
    stops: list[int] = []
    before = {
        name: signal.signal(name, lambda number, _: stops.append(number)) for name in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stops
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _join() -> tuple[int, int]:
    """(this process, all processes) of a `torchrun`; (0, 1) without one."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _average(tensors: list[Tensor], processes: int) -> None:
    """Replace each tensor by its mean over the processes, in one exchange."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = (flat / processes).split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)])
