"""What became of a run, in one word and some sentences: did it learn, too little, too much, and where not.

The limits are rules of thumb, each with its reason:

    0.1 %   by which a held-out loss must fall to count: below, bands rise and fall by chance
    2 %     by which it may rise from its best before the run is called overfitted
    1e-3    ‖ΔW‖ / ‖W‖ below which an adapter barely does anything; working ones have 0.01 to 0.05
    1e-3    of the median layer's ‖ΔW‖ below which a layer is dead
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Literal

from lora_diffusion.adapter import Adapter, same_layer
from lora_diffusion.errors import some
from lora_diffusion.inspection.spectra import singular_values
from lora_diffusion.training.results import TrainResult

Word = Literal["good", "not learned", "overfitted", "unknown"]
LEARNED, RISEN, FAINT, DEAD = 0.001, 0.02, 1e-3, 1e-3
SMALL_SCALE = 0.25  # alpha / rank below which the rate has to make up for it


@dataclass(frozen=True)
class Verdict:
    """One word, and what there is to say and to do."""

    word: Word
    said: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.word}: {'; '.join(self.said)}"


def diagnose(result: TrainResult, adapter: Adapter) -> Verdict:
    """Judge a finished run by its held-out losses and the adapter it made."""
    strength, dead = relative_norm(result, adapter), dead_layers(adapter)
    notes = [f"{len(dead)} of {len(adapter)} layers are dead ({some(dead)})"] if dead else []
    before, after = result.heldout_base, result.heldout_adapter
    if math.isnan(before) or math.isnan(after):
        return Verdict("unknown", (_NOTHING_HELD_OUT, *notes))
    change = f"held-out loss {before:.4f} -> {after:.4f}"
    best = result.best
    if best is not None and best[1] < before * (1 - LEARNED) and after > best[1] * (1 + RISEN):
        lowest = f"the lowest was {best[1]:.4f} at step {best[0]}, which is kept as NAME-best"
        return Verdict("overfitted", (change, lowest, "fewer steps, more pictures or a lower rank", *notes))
    if after <= before * (1 - LEARNED):
        return Verdict("good", (change, *notes))
    if strength is None or strength < FAINT:
        return Verdict("not learned", (change, *_too_faint(strength, adapter), *notes))
    if after > before * (1 + LEARNED):
        return Verdict("overfitted", (change, "the base does better: fewer steps or a lower train.lr", *notes))
    return Verdict("not learned", (change, "captions or pictures may say too little", *notes))


def relative_norm(result: TrainResult, adapter: Adapter) -> float | None:
    """‖ΔW‖ / ‖W‖ over all layers that are low-rank pairs; None where there are none."""
    norms = {(c, same_layer(name)): norm for c, of in result.weights.items() for name, norm in of.items()}
    deltas, weights = 0.0, 0.0
    for component, name, layer in adapter:
        values, weight = singular_values(layer), norms.get((component, same_layer(name)))
        if values is not None and weight is not None:
            deltas, weights = deltas + values.square().sum().item(), weights + weight**2
    return math.sqrt(deltas / weights) if weights else None


def dead_layers(adapter: Adapter) -> list[str]:
    """Low-rank pairs that add next to nothing, beside the median of their component's."""
    dead: list[str] = []
    for component in adapter.layers:
        found = {n: singular_values(layer) for c, n, layer in adapter if c == component}
        norms = {name: values.norm().item() for name, values in found.items() if values is not None}
        limit = DEAD * median(norms.values()) if norms else 0.0
        dead += [f"{component}.{name}" for name, norm in norms.items() if norm <= limit]
    return dead


_NOTHING_HELD_OUT = "no picture was held out, so nobody can say; set data.heldout"


def _too_faint(strength: float | None, adapter: Adapter) -> list[str]:
    ratios = [
        layer.alpha / len(layer.tensors["down"])
        for *_, layer in adapter
        if layer.method == "lora" and layer.alpha is not None
    ]
    scale = median(ratios) if ratios else 1.0
    said = [] if strength is None else [f"the adapter is {strength:.1e} of the weights, working ones are 0.01 to 0.05"]
    if 0 < scale < SMALL_SCALE:
        return [*said, f"alpha is too small: alpha / rank is {scale:.3g}; raise adapter.alpha or train.lr"]
    return [*said, "more steps or a higher train.lr"]
