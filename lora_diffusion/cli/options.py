"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_diffusion.errors import ConfigError

Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="Base model: Diffusers folder or hub id (default: the small one that ships)."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="FILE[:WEIGHT]",
        help="Adapter and weight: 0.8, 0@0,1@0.5, te=0.5:unet=1, each with :mask=left.png or :mask=0-0.5,0-1 "
        "(left-right,top-bottom) for a region; repeatable.",
    ),
]
Quantize = Annotated[
    Literal["fp32", "bf16", "fp16", "int8", "nf4"] | None,
    typer.Option(help="Precision of the denoiser (default: bf16 on a GPU, fp32 on a CPU)."),
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="Guidance scale (default: the pipeline's own, and 1.5 for the base that ships)."),
]
Library = Annotated[
    Path,
    typer.Option(
        "--library", "-l", metavar="FOLDER", help="Where `<lora:name:weight:mask=left.png>` in a prompt looks."
    ),
]
Merging = Annotated[
    list[str], typer.Argument(metavar="FILE[:WEIGHT]", help="Adapter files and their weights (default 1).")
]
Compose = Annotated[
    Literal["sum", "switch", "composite"],
    typer.Option(help="How adapters act together: their sum, taking turns, or the mean of what each predicts alone."),
]
Every = Annotated[int, typer.Option(min=1, help="Steps of one turn, for --compose switch.")]
Balance = Annotated[
    bool, typer.Option("--balance", help="Bring all adapters of a layer to one norm before their weights count.")
]
BaseOfMerge = Annotated[
    str | None, typer.Option("--base", "-b", help="Base model; methods other than low-rank pairs need it.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Adapter file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]
Format = Annotated[str, typer.Option(help="Spelling of the file: diffusers, kohya, comfy, …")]
Size = Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Picture size (default: the base model's own).")]
Config = Annotated[Path, typer.Argument(help="TOML file with the settings of the run.", metavar="CONFIG.toml")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to override, such as train.steps=100 train.batch=1.", metavar="KEY=VALUE"),
]
Negative = Annotated[str | None, typer.Option(help="Negative prompt.")]


def parse_adapter(text: str) -> tuple[Path, Any]:
    """`style.safetensors:0.8`, `…:te=0.5:unet=0@0,1@0.5` or `…:0.8:mask=left.png` -> (path, weight).

    ConfigError for a file that is not there or a weight that is none.
    """
    from lora_diffusion.gates import parse_weight

    parts = text.split(":")
    for end in range(len(parts), 0, -1):
        path = Path(":".join(parts[:end]))
        if path.is_file() or (parts[0] and path.is_dir()):  # a folder: of PEFT, or with one adapter in it
            return path, parse_weight(":".join(parts[end:])) if parts[end:] else 1.0
    raise ConfigError(f"adapter {parts[0]!r} is not there")


def adapter_names(paths: list[Path]) -> list[str]:
    """What each is called: its file's name, with its folder's before it where two files have one name."""
    stems = [path.stem for path in paths]
    names = [p.stem if stems.count(p.stem) == 1 else f"{p.resolve().parent.name}/{p.stem}" for p in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"adapter {next(n for n in names if names.count(n) > 1)!r} is named twice")
    return names


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`768x512` -> (768, 512)."""
    if text is None:
        return None
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"size {text!r} is none; expected WIDTHxHEIGHT such as 768x512")
    return int(width), int(height)


def refuse_existing(path: Path, overwrite: bool, ending: str = "") -> None:
    """ConfigError for a file that is there already, whose folder is not, or whose name does not end in `ending`."""
    if ending and path.suffix.lower() != ending:
        raise ConfigError(f"{path}: expected a name that ends in {ending}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; choose a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another --out or say --overwrite")
    if not path.parent.is_dir():
        raise ConfigError(f"folder {path.parent} for {path.name} is not there")
