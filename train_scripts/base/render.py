"""Render the base model's pictures: every thing of the base styles for the VAE, the listed ones for the denoiser.

    python train_scripts/base/render.py --work ~/base-work

Writes `WORK/pictures.npz`: pictures (N, 64, 64, 3) uint8, labels (N,), styles (N,), listed (N,) bool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from icons import BASE_STYLES, IconSets, read_things


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is not committed")
    work = parser.parse_args().work
    sets = IconSets(work / "npm")
    listed = set(read_things(Path(__file__).with_name("things.txt")))
    if unknown := listed - sets.things.keys():
        raise SystemExit(f"things.txt: not emojibase labels: {sorted(unknown)[:3]}")
    rows = [
        (np.asarray(picture), thing.label, style, thing.label in listed)
        for style in BASE_STYLES
        for thing in sets.things.values()
        if (picture := sets.render(thing, style)) is not None
    ]
    pictures, labels, styles, chosen = (np.array(column) for column in zip(*rows, strict=True))
    np.savez_compressed(work / "pictures.npz", pictures=pictures, labels=labels, styles=styles, listed=chosen)
    for style in BASE_STYLES:
        print(
            f"{style:8} {np.sum(styles == style):5} pictures, {np.sum(chosen & (styles == style)):4} of listed things"
        )


if __name__ == "__main__":
    main()
