"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_diffusion.errors import ConfigError

Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="Base model: Diffusers folder or hub id (default: the small one that ships)."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", "-a", metavar="FILE[:WEIGHT]", help="Adapter file and its weight (default 1); repeatable."
    ),
]
Quantize = Annotated[
    Literal["fp32", "bf16", "fp16", "int8", "nf4"] | None,
    typer.Option(help="Precision of the denoiser (default: bf16 on a GPU, fp32 on a CPU)."),
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(min=0, help="Classifier-free guidance scale.")]
Size = Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Picture size (default: the base model's own).")]
Negative = Annotated[str | None, typer.Option(help="Negative prompt.")]


def parse_adapter(text: str) -> tuple[Path, float]:
    """`style.safetensors:0.8` -> (path, weight). ConfigError for a file that is not there or a weight that is none."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        path, weight = text, "1"
    if not Path(path).is_file():
        raise ConfigError(f"adapter file {path!r} is not there")
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(f"adapter {text!r}: weight {weight!r} is no number") from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`768x512` -> (768, 512)."""
    if text is None:
        return None
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"size {text!r} is none; expected WIDTHxHEIGHT such as 768x512")
    return int(width), int(height)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """ConfigError for a file that is there already, or whose folder is not."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another --out or say --overwrite")
    if not path.parent.is_dir():
        raise ConfigError(f"folder {path.parent} for {path.name} is not there")
