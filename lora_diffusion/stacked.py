"""One adapter of a stack: what it is, how strong, where it sits, and how large its change of each layer is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.fitting import Fit, Site
from lora_diffusion.gates import Resolved, Weight
from lora_diffusion.gates.fading import Fading
from lora_diffusion.lora import Part, Slot, place, slot_of, take_off
from lora_diffusion.methods import METHODS, is_dense
from lora_diffusion.pairs import Pair
from lora_diffusion.products import pair_norm
from lora_diffusion.resident import Met


@dataclass
class Stacked:
    """An adapter, its weight as it was given and as it was understood, and where it goes."""

    name: str
    adapter: Adapter
    weight: Weight
    resolved: Resolved
    met: Met[Fit]  # its places, and its content hash: the canonical order, so that stacking commutes
    left_out: dict[str, str] = field(default_factory=dict)  # of the file, not on -> why; empty unless added leniently
    norms: dict[Site, float] = field(default_factory=dict)
    fading: Fading | None = None  # which of its rows act at which noise, in a denoiser

    @property
    def layers(self) -> dict[Site, LayerAdapter]:
        """Its share of each layer."""
        return self.met.plan.layers

    def part(self, site: Site, layer: nn.Module) -> Part:
        """What it puts on a layer: always the same pair, by which the slot knows its rows, or a new branch."""
        if (pair := self.known(site)) is not None:
            return pair
        adapter = self.layers[site]
        part = METHODS[adapter.method].part(self.name, adapter, layer)
        if isinstance(part, Pair):
            self.met.pairs[site] = part
        return part

    def known(self, site: Site) -> Pair | None:
        """The pair that it has put on a layer before."""
        pair = self.met.pairs.get(site)
        return pair if pair is None or pair.name == self.name else replace(pair, name=self.name)

    def norm(self, site: Site, layer: nn.Module) -> float:
        """Frobenius norm of its change of the layer's weight at weight 1; of a pair without making the product."""
        if site not in self.norms:
            part = self.part(site, layer)
            if isinstance(part, Pair):
                up = part.up.double().reshape(-1, part.rank).t()
                self.norms[site] = pair_norm(part.down.double(), up, part.scale)
            elif not is_dense(self.layers[site].method):
                self.norms[site] = 0.0  # it has none, and `balance` leaves it as it is
            else:
                adapter = self.layers[site]
                self.norms[site] = float(METHODS[adapter.method].delta(adapter, layer).double().norm())
        return self.norms[site]


def settled(layer: nn.Module, parts: Sequence[Part], reserve: int) -> Slot | None:
    """The layer's slot with these parts and a reserve, put on, written anew or taken off as that asks for."""
    slot = slot_of(layer)
    if slot is not None and (hasattr(slot, "_hf_hook") or not (parts or reserve)):
        take_off(layer)  # accelerate would bring the rows it knows back
        slot = None
    if not parts and not reserve:
        return None
    if slot is None:
        slot = Slot(layer, parts, reserve=reserve, gated=False)
        place(layer, slot)
    else:
        slot.reserve = reserve
        slot.pack(layer, parts)
    return slot


def balance(
    stacked: Sequence[Stacked], layers: Mapping[str, nn.Module], component: str
) -> dict[tuple[str, str], float]:
    """(adapter, layer) -> the factor that brings all adapters of that layer to one Frobenius norm.

    The norm they meet at is the geometric mean of theirs, so that no order and no adapter is preferred.
    """
    factors: dict[tuple[str, str], float] = {}
    for name, layer in layers.items():
        there = [one for one in stacked if (component, name) in one.layers]
        for one, factor in zip(there, balanced(one.norm((component, name), layer) for one in there), strict=True):
            factors[one.name, name] = factor
    return factors


def balanced(norms: Iterable[float]) -> list[float]:
    """Factors that bring these norms to their geometric mean. One that is 0 stays so and does not count."""
    norms = list(norms)
    logs = [math.log(norm) for norm in norms if norm > 0]
    mean = math.exp(sum(logs) / len(logs)) if logs else 0.0
    return [mean / norm if norm > 0 else 1.0 for norm in norms]
