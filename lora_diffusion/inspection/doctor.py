"""What became of a run, in one word and some sentences: did it learn, too little, too much, and where not.

The limits are rules of thumb, each with its reason:

    0.1 %   by which a held-out loss must fall to count: below, bands rise and fall by chance
    2 %     by which it may rise from its best before the run is called overfitted
    1e-3    ‖ΔW‖ / ‖W‖ below which an adapter barely does anything; working ones have 0.01 to 0.05
    1e-3    of the median layer's ‖ΔW‖ below which a layer is dead
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from lora_diffusion.adapter import Adapter, same_layer
from lora_diffusion.errors import some
from lora_diffusion.inspection.spectra import Spectrum, Values, all_values, by_block
from lora_diffusion.sizes import size_of
from lora_diffusion.training.results import TrainResult

Word = Literal["good", "not learned", "overfitted", "unknown"]
LEARNED, RISEN, FAINT, DEAD = 0.001, 0.02, 1e-3, 1e-3
SMALL_SCALE = 0.25  # alpha / rank below which the rate has to make up for it


@dataclass(frozen=True)
class Verdict:
    """One word, what there is to say and to do, and the strength that was found on the way."""

    word: Word
    said: tuple[str, ...]
    strength: float | None = None
    """‖ΔW‖ / ‖W‖ over all layers that have singular values; None where none has."""
    blocks: tuple[Spectrum, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.word}: {'; '.join(self.said)}"


def diagnose(result: TrainResult, adapter: Adapter) -> Verdict:
    """Judge a finished run by its held-out losses and the adapter it made."""
    values = all_values(adapter)
    strength, dead = relative_norm(result.weights, values), dead_layers(values)
    notes = [f"{len(dead)} of {len(adapter)} layers are dead ({some(dead)})"] if dead else []
    word, said = _judged(result, adapter, strength)
    return Verdict(word, (*said, *notes), strength, tuple(by_block(values)))


def facts(result: TrainResult, verdict: Verdict) -> Iterable[tuple[str, str]]:
    """What there is to know of a finished run, name and value."""
    if result.adapter is not None and result.adapter.is_file():
        yield "adapter", f"{result.adapter.name}, {size_of(result.adapter.stat().st_size)}"
    yield "trained parameters", f"{result.parameters:,}"
    yield "steps", str(result.steps)
    yield "time of the last call", f"{result.seconds:.0f} s"
    yield "memory at the peak", size_of(result.memory) if result.memory else "unknown"
    yield "held-out loss, base → adapter", result.heldout
    if result.best is not None:
        yield "best held-out loss on the way", f"{result.best[1]:.4f} at step {result.best[0]}"
    yield "‖ΔW‖ / ‖W‖", "unknown for this method" if verdict.strength is None else f"{verdict.strength:.4f}"
    yield "backbone", f"{result.precision}, {'no byte changed' if result.backbone_unchanged else 'CHANGED'}"


def relative_norm(weights: Mapping[str, Mapping[str, float]], values: Values) -> float | None:
    """‖ΔW‖ / ‖W‖ over all layers with singular values, of `weights` component -> layer -> ‖W‖; None without any."""
    norms = {(c, same_layer(name)): norm for c, of in weights.items() for name, norm in of.items()}
    pairs = [(found, norms.get((component, same_layer(name)))) for (component, name), found in values.items()]
    delta = sum(found.square().sum().item() for found, norm in pairs if norm is not None)
    whole = sum(norm**2 for _, norm in pairs if norm is not None)
    return math.sqrt(delta / whole) if whole else None


def dead_layers(values: Values) -> list[str]:
    """Layers that add next to nothing, beside the median of their component's."""
    dead: list[str] = []
    for component in dict.fromkeys(component for component, _ in values):
        norms = {name: found.norm().item() for (c, name), found in values.items() if c == component}
        limit = DEAD * median(norms.values())
        dead += [f"{component}.{name}" for name, norm in norms.items() if norm <= limit]
    return dead


def _judged(result: TrainResult, adapter: Adapter, strength: float | None) -> tuple[Word, tuple[str, ...]]:
    before, after = result.heldout_base, result.heldout_adapter
    if math.isnan(before) or math.isnan(after):
        return "unknown", (_NOTHING_HELD_OUT,)
    change, best = f"held-out loss {result.heldout}", result.best
    if best is not None and best[1] < before * (1 - LEARNED) and after > best[1] * (1 + RISEN):
        lowest = f"the lowest was {best[1]:.4f} at step {best[0]}, which is kept as NAME-best"
        return "overfitted", (change, lowest, "fewer steps, more pictures or a lower rank")
    if after <= before * (1 - LEARNED):
        return "good", (change,)
    if strength is None or strength < FAINT:
        return "not learned", (change, *_too_faint(strength, adapter))
    if after > before * (1 + LEARNED):
        return "overfitted", (change, "the base does better: fewer steps or a lower train.lr")
    return "not learned", (change, "captions or pictures may say too little")


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
