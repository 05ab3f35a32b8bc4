"""Checkpoints: everything a run needs to go on, whole or not at all.

    OUTPUT/checkpoints/step-000200/state.safetensors    adapter tensors, their average and optimiser state
    OUTPUT/checkpoints/step-000200/run.json             step, settings, optimiser numbers, losses

A checkpoint is there whole or not at all, and older ones go only after it. Batches, noise and dropout are functions of
seed and step, so there is no random state to keep. No pickle anywhere.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.drafts import clear_abandoned, whole_folder
from lora_diffusion.errors import ConfigError, LoraDiffusionError

_NAME = re.compile(r"step-(\d{6,})")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class CheckpointError(LoraDiffusionError, OSError):
    """A checkpoint could not be written or read; complete ones stay as they are."""


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """What cannot be written while entered is a CheckpointError that names it, not a bare OSError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LoraDiffusionError) or error.errno not in _FULL:
            raise
        stays = _what_stays(folder / "checkpoints")
        raise CheckpointError(f"{error.filename or folder}: cannot be written: {error.strerror}{stays}") from error


@dataclass(frozen=True)
class Checkpoint:
    """One complete state after `step` optimiser steps."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    settings: dict[str, Any]
    losses: list[float]
    average: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # of the parameters; empty: none is kept
    measured: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])  # step, held-out loss


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write below `folder`, then remove older checkpoints. CheckpointError where the disk will not take it."""
    final = folder / f"step-{checkpoint.step:06d}"
    clear_abandoned(folder, ".step-", age=0)  # one process writes here: what there is, a killed run has left
    try:
        with whole_folder(final) as draft:
            _write(draft, checkpoint)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {final} cannot be written: {_reason(error)}{_what_stays(folder)}") from None
    for old in find_checkpoints(folder)[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one back. CheckpointError for one that is damaged."""
    try:
        run = json.loads((path / "run.json").read_text("utf-8"))
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_reason(error)}; remove it to start again") from None
    parameters, average = (
        {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)} for start in ("adapter/", "ema/")
    )
    measured = [(int(step), float(loss)) for step, loss in run.get("measured", [])]  # earlier versions have none
    optimizer = _optimizer_from(run, tensors)
    return Checkpoint(run["step"], parameters, optimizer, run["settings"], run["losses"], average, measured)


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def check_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str], where: Path, defaults: Mapping[str, Any]
) -> list[str]:
    """What of the `free` settings is other than in the checkpoint; ConfigError where one is that shapes the result.

    A checkpoint of an earlier version lacks the settings that are new since: they had their `defaults` then.
    """
    before, after = _flatten(defaults) | _flatten(then), _flatten(now)
    changed = {
        key: f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }
    if falsified := [said for key, said in changed.items() if key not in free]:
        listed = "; ".join(falsified)
        raise ConfigError(
            f"{where} was made with other settings ({listed}); restore them or choose another output folder"
        )
    return list(changed.values())


def _write(draft: Path, checkpoint: Checkpoint) -> None:
    tensors = {f"adapter/{name}": t.detach().cpu().contiguous() for name, t in checkpoint.parameters.items()}
    tensors |= {f"ema/{name}": t.detach().cpu().contiguous() for name, t in checkpoint.average.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in checkpoint.optimizer["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value.detach().cpu().clone()
            else:
                numbers.setdefault(str(index), {})[key] = value
    run = {
        "step": checkpoint.step,
        "settings": checkpoint.settings,
        "losses": checkpoint.losses,
        "measured": checkpoint.measured,
        "optimizer": {"groups": checkpoint.optimizer["param_groups"], "numbers": numbers},
    }
    save_file(tensors, draft / "state.safetensors")
    (draft / "run.json").write_text(json.dumps(run), "utf-8")


def _optimizer_from(run: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in run["optimizer"]["numbers"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": run["optimizer"]["groups"]}


def _what_stays(folder: Path) -> str:
    kept = find_checkpoints(folder)
    return f"; {kept[-1].name} is complete and stays" if kept else ""


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
