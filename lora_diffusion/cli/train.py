"""`lora-diffusion train CONFIG.toml [key=value …]`"""

from __future__ import annotations

from typing import Annotated

import typer

from lora_diffusion.cli.options import Config, Settings


def train(
    config: Config,
    settings: Settings = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without pictures and captions that cannot be used, and list them.")
    ] = False,
) -> None:
    """Train an adapter on a folder of pictures over a frozen, 4-bit base model.

    Ctrl-C saves a checkpoint; the same command goes on from it and ends with the same bytes.

    Example: `lora-diffusion train train_scripts/configs/ink.toml train.steps=200`
    """
    from lora_diffusion.cli.progress import show_training
    from lora_diffusion.training.config import TrainConfig

    show_training(TrainConfig.load(config, [*(settings or []), *(["data.skip_bad=true"] if skip_bad else [])]))
