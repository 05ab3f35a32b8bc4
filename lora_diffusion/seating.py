"""Adapters on the layers of a pipeline: slots come, are packed or exchanged and go, and dials take their gates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lora_diffusion.banks import Bank, Writes
from lora_diffusion.composing import Composition
from lora_diffusion.dial import Dial
from lora_diffusion.errors import TargetError, some
from lora_diffusion.fitting import Site
from lora_diffusion.layers import FUSIBLE, is_attention, is_bypassed, is_norm, submodule
from lora_diffusion.lora import Slot, slot_of
from lora_diffusion.packing import uncollected, unrecorded, write_all
from lora_diffusion.stacked import Stacked, balance, settled
from lora_diffusion.targets import Targets, find_targets


class Seating:
    """The slots of a stack's adapters on its components (name -> model), and their dials."""

    def __init__(self, components: Mapping[str, nn.Module], dials: Mapping[str, Dial]) -> None:
        self.components, self.dials = components, dials
        self.reserved: dict[Site, int] = {}  # rows to hold at least
        self._banks: list[Bank] = []

    def check(self, sites: Collection[Site]) -> None:
        """TargetError where somebody else's adapters are on one of these layers, or a fused layer computes past it."""
        parents = dict[Site, nn.Module]()  # fewer than layers
        for component, name in sites:
            above, _, own = name.rpartition(".")
            if (ours := name in self.dials[component].slots) and own not in FUSIBLE:
                continue
            if (parent := parents.get((component, above))) is None:
                parent = parents[component, above] = submodule(self.components[component], above)
            if is_bypassed(parent, own):
                raise TargetError(
                    f"{component} {name} is not called: its projections are fused; call unfuse_qkv_projections() first"
                )
            if not ours and slot_of(submodule(parent, own)) is not None:
                raise TargetError(
                    f"{component} {name} carries adapters of another stack or of a training; add to that stack, "
                    "or clear it first"
                )

    def reserve(self, component: str, targets: Targets, rank: int) -> dict[Site, int]:
        """Have the target layers hold `rank` rows at least once they are seated. TargetError where there are none."""
        layers = find_targets(self.components[component], targets)
        if rowless := [name for name, layer in layers.items() if is_norm(layer) or is_attention(layer)]:
            raise TargetError(f"reserve: {some(rowless)} hold no rows; expected linear layers or convolutions")
        sites = {(component, name): rank for name in layers}
        self.check(sites)
        self.reserved |= sites
        return sites

    @uncollected()
    def seat(self, sites: Collection[Site], stacked: Sequence[Stacked], composition: Composition) -> None:
        """Put on these layers what belongs there of all adapters, given in the order they were added.

        So on layers that were moved or cast since: what was rounded is written anew.
        """
        moved = {(c, name) for c, dial in self.dials.items() for name, slot in dial.slots.items() if slot.moved}
        sites = moved.union(sites) if moved else sites
        ordered = sorted(stacked, key=lambda one: (one.met.key, one.name)) if len(stacked) > 1 else stacked
        slots = {component: dict(self.dials[component].slots) for component in {component for component, _ in sites}}
        stayed, writes = True, Writes()
        with unrecorded():
            for here, of in _by_adapters(sites, ordered):
                if self._exchanged({site: slots[site[0]].get(site[1]) for site in of}, here, writes):
                    continue
                self._banks, stayed = [], False  # they would keep what goes
                for site in of:
                    component, name = site
                    layer = submodule(self.components[component], name)
                    slot = settled(layer, [one.part(site, layer) for one in here], self.reserved.get(site, 0))
                    if slot is not None:
                        slots[component][name] = slot
                    else:
                        slots[component].pop(name, None)
            write_all(writes)
        for component, of in slots.items():
            self.bind(component, of, stacked, composition, stayed=stayed)

    def bind(
        self,
        component: str,
        slots: Mapping[str, Slot],
        stacked: Sequence[Stacked],
        composition: Composition,
        *,
        stayed: bool = False,
    ) -> None:
        """Give a component's dial what is on now; `stayed`: the slots and their ranks are those it has."""
        weights = {one.name: one.resolved for one in stacked}
        fadings = {one.name: one.fading for one in stacked if one.fading}
        dial, layers = self.dials[component], dict[str, nn.Module]()
        if composition.balance:
            layers = {name: submodule(self.components[component], name) for name in slots}
        elif stayed and not fadings and dial.rebind(weights):
            return
        dial.bind(slots, weights, composition, balance(stacked, layers, component), fadings)

    def _exchanged(self, slots: Mapping[Site, Slot | None], here: Sequence[Stacked], writes: Writes) -> bool:
        there = {site: slot for site, slot in slots.items() if slot is not None}
        if len(there) < len(slots) or any("_hf_hook" in vars(slot) for slot in there.values()):
            return False
        if any(slot.reserve != self.reserved.get(site, 0) for site, slot in there.items()):
            return False
        bank = next((bank for bank in self._banks if bank.holds(there)), None)
        if bank is None and (bank := Bank.of(there, len(here))) is not None:
            self._banks.append(bank)
        return bank is not None and bank.exchange(here, writes)


def _by_adapters(sites: Collection[Site], stacked: Sequence[Stacked]) -> Iterable[tuple[list[Stacked], list[Site]]]:
    """Sites by the adapters that are to be there, each as (those adapters, the sites)."""
    layers, found = [(number, one.layers) for number, one in enumerate(stacked)], dict[tuple[int, ...], list[Site]]()
    for site in sites:
        found.setdefault(tuple([number for number, there in layers if site in there]), []).append(site)
    return [([stacked[number] for number in here], of) for here, of in found.items()]


def hosts_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component name. TargetError for what is none."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TargetError(f"{type(pipe).__name__} is no Diffusers pipeline: it has no components")
    return {name: model for name, model in components.items() if isinstance(model, nn.Module)}


def inner(host: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` returned."""
    model = getattr(host, "_orig_mod", host)
    return model if isinstance(model, nn.Module) else host
