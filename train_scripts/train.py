"""The engine of `lora-diffusion train`, for `accelerate launch` on one or several processes.

    accelerate launch --cpu --num_processes 2 train_scripts/train.py train_scripts/configs/ink.toml train.steps=100

Each process holds the whole frozen backbone (4-bit where the configuration says so) and takes its own batches;
the gradients of the adapter are averaged. N processes with accumulation 1 do what one does with accumulation N.
"""

from __future__ import annotations

from lora_diffusion.cli import run
from lora_diffusion.cli.train import train

if __name__ == "__main__":
    run(train)
