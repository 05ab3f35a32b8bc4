"""The command line. One file a command, no logic; heavy imports happen inside the commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import typer

from lora_diffusion.cli.bake import bake
from lora_diffusion.cli.conflicts import conflicts
from lora_diffusion.cli.convert import convert
from lora_diffusion.cli.doctor import doctor
from lora_diffusion.cli.extract import extract
from lora_diffusion.cli.generate import generate
from lora_diffusion.cli.grid import grid
from lora_diffusion.cli.inspect import inspect
from lora_diffusion.cli.merge import merge
from lora_diffusion.cli.methods import methods
from lora_diffusion.cli.plan import plan
from lora_diffusion.cli.quickstart import quickstart
from lora_diffusion.cli.resize import resize
from lora_diffusion.cli.train import train
from lora_diffusion.errors import LoraDiffusionError

_FULL = (
    "the GPU's memory is full; training takes less with train.checkpointing=true and a lower train.batch"
    " (`lora-diffusion plan CONFIG.toml --gpu GIB` says what fits), drawing with --quantize nf4"
)


def application(*commands: Callable[..., None]) -> typer.Typer:
    """A typer application of these commands (one command: without a name of its own)."""
    app = typer.Typer(
        name="lora-diffusion",
        help="Train, load, blend and merge LoRA adapters for Diffusers pipelines, over 4-bit frozen backbones.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in commands:
        app.command()(command)
    return app


def run(*commands: Callable[..., None]) -> None:
    """Run a command line. What goes wrong on purpose is one sentence and exit code 2; an interruption is 130."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of optional kernels that it does not find
    try:
        application(*commands)()
    except LoraDiffusionError as error:
        print(f"lora-diffusion: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch here would cost seconds
            raise
        print(f"lora-diffusion: {_FULL}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lora-diffusion: interrupted", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Entry point of `lora-diffusion`."""
    of_training = (quickstart, plan, train, doctor)
    run(*of_training, generate, grid, merge, resize, extract, bake, conflicts, inspect, convert, methods)


if __name__ == "__main__":
    main()
