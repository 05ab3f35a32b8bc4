"""A training run that can stop at any moment and go on with the same command.

State (weights, moving average, optimiser, sample count, random generator) goes into one file, written
beside the old one and renamed over it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

EMA_DECAY = 0.999


class Run:
    """Trains `model` until `samples` have been seen, saving every `every` seconds.

    The learning rate warms up over the first 2 % and falls by a cosine to 2 % of `lr` at the end.
    `budget` (seconds) only decides when this call stops; it never changes what is learned.
    """

    def __init__(self, path: Path, model: nn.Module, *, lr: float, samples: int, batch: int, seed: int = 0) -> None:
        self.path, self.model, self.lr, self.samples, self.batch = path, model, lr, samples, batch
        self.seen = 0
        self.seconds = 0.0
        self.random = torch.Generator().manual_seed(seed)
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
        if path.exists():
            self._restore()

    def train(self, loss_of: Callable[[int, torch.Generator], Tensor], budget: float, every: float = 120) -> bool:
        """`loss_of(batch, generator)` once a step; True when all samples have been seen."""
        start = last = time.monotonic()
        recent: list[float] = []
        for step, lr in enumerate(self._rates()):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of(self.batch, self.random)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self._follow()
            self.seen += self.batch
            recent.append(loss.item())
            now = time.monotonic()
            if step % 50 == 49:
                speed = len(recent) * self.batch / (now - start) if step < 50 else 50 * self.batch / (now - mark)
                print(f"{self.seen:8d}/{self.samples} loss {sum(recent[-50:]) / 50:.4f} lr {lr:.2e} {speed:.0f}/s", flush=True)
            if step % 50 in (49, 0):
                mark = now
            if now - last > every or now - start > budget:
                self.seconds += now - last
                last = now
                self.save()
            if now - start > budget:
                return False
        self.seconds += time.monotonic() - last
        self.save()
        return True

    def save(self) -> None:
        """Write the state atomically."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "seen": self.seen,
            "seconds": self.seconds,
        }
        draft = self.path.with_suffix(".part")
        torch.save(state, draft)
        os.replace(draft, self.path)

    def use_average(self) -> None:
        """Put the moving average into the model (at the end, for export)."""
        self.model.load_state_dict(self.average)

    def _restore(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        self.seen, self.seconds = state["seen"], state["seconds"]
        print(f"resumed {self.path.name} at {self.seen} samples", flush=True)

    def _rates(self) -> Iterator[float]:
        while self.seen < self.samples:
            done = self.seen / self.samples
            yield self.lr * min(1.0, (done + 1e-4) / 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(EMA_DECAY, (1 + self.seen / self.batch) / (10 + self.seen / self.batch))
        ours = self.model.state_dict()
        floats = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in floats], [ours[n] for n in floats], 1 - decay)
