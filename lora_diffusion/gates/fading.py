"""A gate by noise: the more of it, the fewer ranks of an adapter act (T-LoRA, Soboleva et al. 2025, arXiv 2507.05964).

    ranks(u) = min_rank + ⌊(1 - u)^power · (rank - min_rank)⌋        u = timestep / number of timesteps, or sigma

The first ranks act always, the last only near the clean end. What an adapter asks for stands in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lora_diffusion.errors import AdapterFileError

KEY = "lora_diffusion.fading"  # in an adapter's metadata
STEEPEST = 1e3  # what `power` stays below


@dataclass(frozen=True)
class Fading:
    """`min_rank` and `power` of the formula; a rank is `rows` rows of the pair (2 where a start is taken off again)."""

    min_rank: int
    power: float = 1.0
    rows: int = 1

    def ranks(self, rank: int, noise: float) -> int:
        """How many of `rank` ranks act at `noise`; beyond 0 and 1 as there."""
        low, clean = min(self.min_rank, rank), min(1.0, max(0.0, 1 - noise))
        return low + int(clean**self.power * (rank - low))

    def active(self, rows: int, noise: float) -> int:
        """How many of a pair's `rows` act."""
        return self.rows * self.ranks(rows // self.rows, noise)

    def metadata(self) -> dict[str, str]:
        """For the adapter's file."""
        return {KEY: json.dumps(asdict(self), sort_keys=True)}


def fading_of(metadata: Mapping[str, str], adapter: str) -> Fading | None:
    """What an adapter's metadata ask for; None where they do not. AdapterFileError for damaged ones."""
    if KEY not in metadata:
        return None
    try:
        given = json.loads(metadata[KEY])
        fading = Fading(int(given["min_rank"]), float(given["power"]), int(given["rows"]))
    except (ValueError, TypeError, KeyError, OverflowError):
        fading = None
    if fading is None or fading.min_rank < 0 or fading.rows < 1 or not 0 < fading.power < STEEPEST:
        raise AdapterFileError(
            f"adapter {adapter!r}: metadata {KEY} is {metadata[KEY][:100]!r}; expected min_rank, power and rows"
        )
    return fading
