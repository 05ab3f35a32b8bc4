"""The end of a run: measured against the base, taken off, saved with what it says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.adapter import Adapter
from lora_diffusion.formats.files import save_adapter
from lora_diffusion.pipelines import DTYPES
from lora_diffusion.quantize import fingerprint
from lora_diffusion.training.results import Listener, Progress, TrainResult

if TYPE_CHECKING:
    from lora_diffusion.training.loop import Run


def finish(run: Run, seconds: float, listen: Listener) -> TrainResult:
    """Measure base and adapter, take the slots off and write the files (the average as `train.ema_saved` says)."""
    name, cap = run.config.name, run.config.adapter.max_norm
    beside = run.average is not None and run.config.train.ema_saved == "beside"
    if run.average and not beside:
        run.average.put_in(cap)
    run.attachment.weigh(0.0)
    listen(Progress("measure", 0, 2))
    base = run.measure(run.heldout)
    run.attachment.weigh(1.0)
    listen(Progress("measure", 1, 2))
    made = [_measured(run, name)]
    if run.average and beside:
        run.average.put_in(cap)
        made.append(_measured(run, f"{name}-ema"))
    listen(Progress("measure", 2, 2))
    run.attachment.detach()
    unchanged = fingerprint(run.denoiser) == run.before
    if run.processes.index == 0:
        for adapter, loss in made:
            said = _metadata(run, adapter.name, base, loss)
            save_adapter(adapter, _path(run, adapter), format=run.format, overwrite=True, metadata=said)
    run.processes.wait()
    (adapter, trained), report = made[0], run.opened.report
    return TrainResult(
        _path(run, adapter), run.step, seconds, run.losses, base, trained, unchanged, adapter.parameters, report
    )


def _measured(run: Run, name: str) -> tuple[Adapter, float]:
    """The adapter as it is now, and its held-out loss."""
    loss = run.measure(run.heldout)
    return run.attachment.adapter(name, dtype=DTYPES[run.config.adapter.save_dtype]), loss


def _path(run: Run, adapter: Adapter) -> Path:
    return run.config.output / f"{adapter.name}.safetensors"


def _metadata(run: Run, title: str, base: float, trained: float) -> dict[str, str]:
    config = run.config.model_dump(mode="json", exclude={"output": True, "base": True, "adapter": {"init_from"}})
    facts = {
        "base": Path(run.config.base).name,
        "base_precision": run.config.backbone.precision,
        "base_sha256": run.before,
        "family": run.family.name,
        "heldout_loss_base": base,
        "heldout_loss_adapter": trained,
        "pictures": len(run.data.items),
        **({} if run.start is None else {"continues_sha256": run.start}),
        "settings": {**config, "data": {"resolution": run.config.data.resolution}},
    }
    return {
        "lora_diffusion": json.dumps(facts, sort_keys=True),
        "modelspec.title": title,
        "modelspec.trigger_phrase": run.config.data.trigger,
    }
