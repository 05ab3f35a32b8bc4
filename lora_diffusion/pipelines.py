"""Open a Diffusers pipeline: from a folder or the hub's cache, on a device, over a 4-bit or plain backbone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.adapter import DENOISERS
from lora_diffusion.errors import ConfigError
from lora_diffusion.families import FAMILIES
from lora_diffusion.quantize import (
    Precision,
    QuantizationReport,
    WeightFiles,
    empty_encoder,
    empty_model,
    encoder_weights,
    load_quantized,
    quantize,
    saved_as,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Opened:
    """A pipeline and what was done to its denoiser."""

    pipe: Any
    device: torch.device
    dtype: torch.dtype  # what it computes in
    report: QuantizationReport | None  # None when the backbone was left in `dtype`


def pick_device(name: str = "auto") -> torch.device:
    """ "auto": a GPU where there is one. ConfigError for a GPU that is not there."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name.split(":")[0]]:
        here = f"torch {torch.__version__} finds none"
        raise ConfigError(f"device {name!r} was asked for, but {here}; use cpu (device=, --device, backbone.device)")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def load_pipeline(
    base: str | Path,
    *,
    precision: Precision = "nf4",
    compute: str = "auto",
    device: str = "auto",
    text_encoders: Precision | None = None,
    keep_adaln: bool = False,
) -> Opened:
    """Open `base` (Diffusers folder or hub id) frozen, its denoiser in `precision`, everything else in `compute`.

    Precision is "fp32", "bf16", "fp16", "int8" or "nf4". A denoiser to be quantised is read layer by layer from the
    folder, so that memory never holds more of it than the quantised model and one layer. Its family says which layers
    stay in 16 bits besides the usual, with `keep_adaln` the timestep modulation too. `text_encoders` that are to be
    quantised are read in the same way. A denoiser that `save_quantized` wrote into the folder is opened as it is, and
    only at its own precision. ConfigError where the base cannot be opened, the device is absent or
    bitsandbytes is missing.
    """
    place = pick_device(device)
    base = folder_of(base)
    dtype = DTYPES[precision] if precision in DTYPES and compute == "auto" else pick_dtype(compute, place)
    if (saved := _saved(base)) is not None:
        dtype = _dtype_of_saved(base, saved, precision, compute)
    empty = {} if precision in DTYPES and saved is None else _empty_denoiser(base)
    encoders = {} if text_encoders is None or text_encoders in DTYPES else _empty_encoders(base)
    pipe = _open(base, dtype, **empty, **{name: model for name, (model, _) in encoders.items()})
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    report = None
    if saved is not None:
        report = load_quantized(denoiser_of(pipe), base / saved[0], device=place)
    elif precision not in DTYPES:
        weights = WeightFiles(base / next(iter(empty))) if empty else None
        told: dict[str, Any] = {"compute_dtype": dtype, "device": place, "keep_adaln": keep_adaln}
        report = quantize(denoiser_of(pipe), precision, keep=kept_layers(pipe), weights=weights, **told)
    if text_encoders is not None:
        read = {name: weights for name, (_, weights) in encoders.items()}
        quantize_encoders(pipe, text_encoders, dtype, place, read)
    pipe.to(place)
    pipe.set_progress_bar_config(disable=True)
    return Opened(pipe, place, dtype, report)


def quantize_encoders(
    pipe: Any,
    precision: Precision,
    dtype: torch.dtype,
    device: torch.device | str,
    weights: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Quantise and freeze the text encoders of a pipeline, moving each layer to `device` on the way.

    Those named in `weights` are empty and are read from there.
    """
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, torch.nn.Module):
            kept = sorted({inner for inner, _ in part.named_modules() if inner.endswith(".wo")})
            read = (weights or {}).get(name)  # T5 casts to the dtype of `wo`, which is therefore kept
            quantize(part, precision, compute_dtype=dtype, device=device, keep=kept, weights=read)


def load_for_drawing(base: str | Path, precision: Precision | None, device: str) -> Opened:
    """`load_pipeline` with the precision that suits the device when None: bf16 on a GPU, fp32 on a CPU.

    A denoiser that was saved quantised keeps the precision it has.
    """
    if precision is None and (saved := _saved(folder_of(base))) is not None:
        precision = cast("Precision", saved[1])
    if precision is None:
        precision = "fp32" if pick_device(device).type == "cpu" else "bf16"
    return load_pipeline(base, precision=precision, device=device)


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The U-Net or transformer of a pipeline. ConfigError where there is none."""
    for name in DENOISERS:
        if isinstance(model := getattr(pipe, name, None), torch.nn.Module):
            return model
    raise ConfigError(f"{type(pipe).__name__} has no denoiser; expected a component {' or '.join(DENOISERS)}")


def present(pipe: Any, names: Iterable[str]) -> list[str]:
    """Those of the components `names` that the pipeline has as models."""
    return [name for name in names if isinstance(getattr(pipe, name, None), torch.nn.Module)]


def kept_layers(pipe: Any) -> tuple[str, ...]:
    """The family's own layers for 16 bits; none for a pipeline that is of no family."""
    return next((family.kept for family in FAMILIES.values() if family.matches(pipe)), ())


@torch.no_grad()
def draw_one(pipe: Any, prompt: str, seed: int, *, steps: int, guidance: float, side: int) -> Image.Image:
    """One square picture, `side` pixels wide; the same on every device, because the noise is made on the CPU."""
    (picture,) = pipe(
        prompt,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=side,
        height=side,
    ).images
    return picture


def folder_of(base: str | Path) -> Path:
    """The pipeline folder that `base` names: itself, or what the hub's cache has of that id (else it is fetched).

    ConfigError for what is neither.
    """
    folder, named = Path(base).expanduser(), str(base)
    if folder.exists() or isinstance(base, Path) or named.startswith((".", "/", "~")) or named.count("/") != 1:
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"base {named!r} is no Diffusers folder: there is no model_index.json in it")
        return folder
    with quiet():
        from diffusers import DiffusionPipeline

        try:
            return Path(DiffusionPipeline.download(named))
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"base {named!r} is no folder here and cannot be opened: {_reason(error)}") from None


def _saved(folder: Path) -> tuple[str, str, torch.dtype] | None:
    """(component, precision, what it computes in) of a denoiser that `save_quantized` wrote to a pipeline's folder."""
    found = ((name, saved_as(folder / name)) for name in DENOISERS)
    return next(((name, *saved) for name, saved in found if saved is not None), None)


def _dtype_of_saved(base: Path, saved: tuple[str, str, torch.dtype], precision: Precision, compute: str) -> torch.dtype:
    component, stored, dtype = saved
    if precision != stored or (compute != "auto" and DTYPES[compute] != dtype):
        asked = precision if precision != stored else f"{precision} that computes in {compute}"
        raise ConfigError(
            f"base {str(base)!r} has its {component} in {stored}, computing in {str(dtype).removeprefix('torch.')}; "
            f"{asked} was asked for, which the base it was made of can give"
        )
    return dtype


def _empty_denoiser(folder: Path) -> dict[str, torch.nn.Module]:
    """Component name -> denoiser without weights; nothing for what is no sound pipeline folder (`_open` says why)."""
    import diffusers

    components = _components(folder)
    try:
        for name in DENOISERS:
            library, kind = components.get(name, ("", ""))
            if library == "diffusers":
                with quiet():
                    return {name: empty_model(getattr(diffusers, kind), folder / name)}
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    return {}


def _empty_encoders(folder: Path) -> dict[str, tuple[torch.nn.Module, Mapping[str, Tensor]]]:
    """Text encoders without weights, and where those are. What cannot be read so is left to Transformers, whole."""
    found = dict[str, tuple[torch.nn.Module, Mapping[str, Tensor]]]()
    for name, (library, kind) in _components(folder).items():
        if name.startswith("text_encoder") and library == "transformers":
            try:
                model = empty_encoder(kind, folder / name)
                found[name] = model, encoder_weights(model, folder / name)
            except (ConfigError, OSError, ValueError, TypeError, AttributeError):
                continue
    return found


def _components(folder: Path) -> dict[str, tuple[str, str]]:
    """Component -> (library, class) of a pipeline folder; nothing for what is none."""
    try:
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_text("utf-8"))
        pairs = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: (library, kind) for name, (library, kind) in pairs.items() if isinstance(kind, str)}


def _open(folder: Path, dtype: torch.dtype, **components: torch.nn.Module) -> Any:
    with quiet():
        from diffusers import DiffusionPipeline

        try:
            return DiffusionPipeline.from_pretrained(folder, dtype=dtype, **components)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"base {str(folder)!r} cannot be opened: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first line of what Diffusers says, without the stack trace that nobody sees."""
    said = str(error).strip().splitlines()
    return said[0].split(" Please check")[0] if said else type(error).__name__


@contextmanager
def quiet() -> Generator[None]:
    """Hold back the progress bars and notices of diffusers and transformers that no user can act on."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library, _ in before:
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, level in before:
                library.set_verbosity(level)
                library.enable_progress_bar()
