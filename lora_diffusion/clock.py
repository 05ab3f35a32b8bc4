"""How far a run is: from the timestep that a denoiser is called with and its pipeline's scheduler.

Progress counts the timesteps of this run: 0 in its first denoiser call, 1 in its last, whatever the scheduler's
spacing. A run that starts late (img2img) counts from where it starts. Calls at one timestep (classifier-free
guidance in two calls, second-order schedulers) are at one progress.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Clock:
    """Progress of the runs of one pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._seen: Tensor | None = None  # the scheduler's timesteps of the current run: new ones with each run
        self._times = torch.zeros(1)
        self._start = 0
        self.noise = 0.0  # of that call, in [0, 1]: its timestep over those that there are in training
        self.step = 0  # of the call that progress was last asked for, from 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        """Of the pipeline's copy where that is being copied; a model that is copied alone takes no pipeline along."""
        new = memo[id(self)] = Clock(memo.get(id(self.pipe), self.pipe))
        return new

    def progress(self, timestep: Any) -> float:
        """Progress in [0, 1] at `timestep` (a number or (batch,)), as the denoiser gets it."""
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        if timestep is None or not isinstance(timesteps, Tensor) or not len(timesteps):
            self.step, self.noise = 0, 0.0
            return 0.0
        started = self._seen is timesteps
        if not started:
            self._seen = timesteps
            self._times = torch.unique_consecutive(timesteps.detach().double().cpu())
        index = self._index(float(torch.as_tensor(timestep).double().flatten()[0]))
        if not started or index < self._start:
            self._start = index
        count = getattr(self.pipe.scheduler, "config", {}).get("num_train_timesteps", 1000)
        self.noise = min(1.0, float(self._times[index]) / count)
        steps, self.step = len(self._times) - 1 - self._start, index - self._start
        return self.step / steps if steps else 0.0

    def _index(self, timestep: float) -> int:
        """Where it is among the run's timesteps; transformers get it in [0, 1], some of them reversed."""
        meant = torch.tensor([[timestep], [1000 * timestep], [1000 * (1 - timestep)]], dtype=torch.float64)
        nearest = (self._times - meant).abs().min(dim=1)
        return int(nearest.indices[nearest.values.argmin()])
