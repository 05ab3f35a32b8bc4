"""The end of a run: measured against the base, taken off, saved with what it says about itself."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import AdapterMismatchError
from lora_diffusion.families.original import named_for
from lora_diffusion.formats.files import save_adapter
from lora_diffusion.layers import core
from lora_diffusion.pipelines import DTYPES
from lora_diffusion.quantize import dequantize, fingerprint
from lora_diffusion.training.judging import mean
from lora_diffusion.training.results import Listener, Progress, TrainResult

if TYPE_CHECKING:
    from lora_diffusion.training.loop import Run

MOST_TAGS = 200


def finish(run: Run, seconds: float, listen: Listener) -> TrainResult:
    """Measure base and adapter, take the slots off and write the files (the average as `train.ema_saved` says)."""
    name, cap = run.config.name, run.config.adapter.max_norm
    beside = run.average is not None and run.config.train.ema_saved == "beside"
    if run.average and not beside:
        run.average.put_in(cap)
    run.trained.weigh(0.0)
    listen(Progress("measure", 0, 2))
    base = run.judge.bands(run.heldout)
    run.trained.weigh(1.0)
    listen(Progress("measure", 1, 2))
    made = [_measured(run, name)]
    if run.average and beside:
        run.average.put_in(cap)
        made.append(_measured(run, f"{name}-ema"))
    listen(Progress("measure", 2, 2))
    if run.config.watch.prompts and run.processes.index == 0:
        run.board.picture(run.step, run.painter.at_weights(run.trained))
    if run.heldout.items and run.step not in dict(run.measured):
        run.board.points(run.step, {"loss/heldout": mean(made[0][1])})
    norms = {a.component: {n: _norm(a.model, n) for n in a.slots} for a in run.trained.attachments}
    run.trained.detach()
    unchanged = fingerprint(run.denoiser) == run.before
    if run.processes.index == 0:
        for adapter, bands in made:
            said = _metadata(run, adapter.name, mean(base), mean(bands))
            _save(run, adapter, said)
    adapter, trained = made[0]
    result = TrainResult(
        _path(run, adapter),
        run.step,
        seconds,
        run.losses,
        mean(base),
        mean(trained),
        unchanged,
        adapter.parameters,
        run.opened.report,
        bands_base=base,
        bands_adapter=trained,
        measured=run.measured,
        weights=norms,
        previews=sorted((run.config.output / "previews").glob("[sw]*.png")),
        memory=_peak_memory(),
        precision=run.config.backbone.precision,
        left_out=list(run.prepared.skipped.values()),
    )
    if run.processes.index == 0:
        result.write(run.config.output)
    run.processes.wait()
    return result


def save_state(run: Run, title: str, loss: float = math.nan) -> Path:
    """Keep the adapter as it is now as TITLE.safetensors; `loss` is its held-out one, where that is known."""
    adapter = run.trained.adapter(title, dtype=DTYPES[run.config.adapter.save_dtype])
    path, said = _path(run, adapter), _metadata(run, title, None, loss)
    if run.processes.index == 0:
        _save(run, adapter, said)
    return path


def _save(run: Run, adapter: Adapter, said: dict[str, str]) -> None:
    """Write the file, under the layer names that the tools of its format know where those can say the method."""
    with suppress(AdapterMismatchError):
        adapter = named_for(adapter, run.format, {a.component: a.model for a in run.trained.attachments})
    save_adapter(adapter, _path(run, adapter), format=run.format, overwrite=True, metadata=said)


def _norm(model: nn.Module, name: str) -> float:
    return dequantize(core(model.get_submodule(name))).float().norm().item()


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # there is none on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measured(run: Run, name: str) -> tuple[Adapter, list[float]]:
    """The adapter as it is now, and its held-out losses by band."""
    bands = run.judge.bands(run.heldout)
    return run.trained.adapter(name, dtype=DTYPES[run.config.adapter.save_dtype]), bands


def _path(run: Run, adapter: Adapter) -> Path:
    return run.config.output / f"{adapter.name}.safetensors"


def _metadata(run: Run, title: str, base: float | None, trained: float) -> dict[str, str]:
    config = run.config.model_dump(
        mode="json", exclude={"output": True, "base": True, "watch": True, "adapter": {"init_from"}}
    )
    facts = {
        "base": Path(run.config.base).name,
        "base_precision": run.config.backbone.precision,
        "base_sha256": run.before,
        "family": run.family.name,
        **({} if base is None or math.isnan(base) else {"heldout_loss_base": base}),
        **({} if math.isnan(trained) else {"heldout_loss_adapter": trained}),
        "pictures": len(run.data.items),
        "step": run.step,
        **({} if run.start is None else {"continues_sha256": run.start}),
        "settings": {**config, "data": {"resolution": run.config.data.resolution}},
    }
    return {"lora_diffusion": json.dumps(facts, sort_keys=True), "modelspec.title": title, **_for_others(run)}


def _for_others(run: Run) -> dict[str, str]:
    """The run in the keys that other tools show: sd-scripts' and those of the model specification.

    Without a date, so that the same run writes the same bytes.
    """
    data, loop = run.config.data, run.config.train
    predicts = {"v_prediction": "v", "epsilon": "epsilon"}
    scheduler: Any = getattr(run.opened.pipe.scheduler, "config", {})
    said = {
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.trigger_phrase": data.trigger,
        "modelspec.prediction_type": predicts.get(scheduler.get("prediction_type"), ""),
        "ss_sd_model_name": Path(run.config.base).name,
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_num_train_images": str(len(run.data.items)),
        "ss_batch_size_per_device": str(loop.batch),
        "ss_gradient_accumulation_steps": str(loop.accumulate),
        "ss_steps": str(run.step),
        "ss_max_train_steps": str(loop.steps),
        "ss_learning_rate": str(loop.lr),
        "ss_optimizer": loop.optimizer,
        "ss_lr_scheduler": loop.schedule,
        "ss_seed": str(loop.seed),
        "ss_tag_frequency": _tags(run),
    }
    return {key: value for key, value in said.items() if value}


def _tags(run: Run) -> str:
    """{folder: {tag: pictures}} of the commonest tags, as sd-scripts counts them: what stands between commas."""
    texts = [run.data.texts[item.captions[0]] for item in run.data.items if item.captions and run.data.texts]
    tags = Counter(tag.strip() for text in texts for tag in text.split(",") if tag.strip())
    return json.dumps({run.config.data.folder.name: dict(tags.most_common(MOST_TAGS))}) if tags else ""
