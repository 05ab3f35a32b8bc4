"""The engine of `lora-diffusion train`, for `accelerate launch` or `torchrun` on one or several processes.

    accelerate launch --multi_gpu train_scripts/train.py train_scripts/configs/ink.toml train.steps=100
    torchrun --nproc-per-node 2 train_scripts/train.py train_scripts/configs/ink.toml    # processes on a CPU

Each process holds the whole frozen backbone (4-bit where the configuration says so) and takes its own batches;
the gradients of the adapter are averaged. N processes with accumulation 1 do what one does with accumulation N.
(`accelerate launch --cpu --num_processes 2` starts one process unless it is given MPI.)
"""

from __future__ import annotations

from lora_diffusion.cli import run
from lora_diffusion.cli.train import train

if __name__ == "__main__":
    run(train)
