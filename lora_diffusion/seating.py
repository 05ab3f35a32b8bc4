"""Adapters on the layers of a pipeline: slots come, are packed or exchanged and go, and dials take their gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from lora_diffusion.composing import Composition
from lora_diffusion.dial import Dial
from lora_diffusion.fitting import Site
from lora_diffusion.layers import submodule
from lora_diffusion.lora import Slot, place, slot_of, take_off
from lora_diffusion.packing import write_all
from lora_diffusion.stacked import Stacked, balance


class Seating:
    """The slots of a stack's adapters on its components (name -> model), and their dials."""

    def __init__(self, components: Mapping[str, nn.Module], dials: Mapping[str, Dial]) -> None:
        self.components, self.dials = components, dials
        self.reserved: dict[Site, int] = {}  # rows to hold at least

    def seat(self, sites: Iterable[Site], stacked: Sequence[Stacked], composition: Composition) -> None:
        """Put on these layers what belongs there of all adapters, given in the order they were added."""
        ordered = sorted(stacked, key=lambda one: (one.met.key, one.name)) if len(stacked) > 1 else stacked
        there, writes, stayed = [(one, one.layers) for one in ordered], list[tuple[Tensor, Tensor]](), True
        sites = list(sites)
        for site in sites:
            slot, reserve = self.dials[site[0]].slots.get(site[1]), self.reserved.get(site, 0)
            known = [one.known(site) for one, layers in there if site in layers]
            pairs = [pair for pair in known if pair is not None]
            same = slot is not None and slot.reserve == reserve and "_hf_hook" not in vars(slot)
            if slot is not None and same and pairs and len(pairs) == len(known) and slot.exchange(pairs, writes):
                continue
            self._pack(site, [one for one, layers in there if site in layers])
            stayed = False
        write_all(writes)
        self.bind({component for component, _ in sites}, stacked, composition, stayed=stayed)

    def bind(
        self, components: Iterable[str], stacked: Sequence[Stacked], composition: Composition, *, stayed: bool = False
    ) -> None:
        """Give the dials of these components what is on now; `stayed`: on the slots that they have."""
        weights = {one.name: one.resolved for one in stacked}
        fadings = {one.name: one.fading for one in stacked if one.fading}
        for component in components:
            dial = self.dials[component]
            if stayed and not fadings and not composition.balance and dial.rebind(weights):
                continue
            layers = self._occupied(component, stacked)
            slots = {name: slot for name, layer in layers.items() if (slot := slot_of(layer)) is not None}
            even = balance(stacked, layers, component) if composition.balance else {}
            dial.bind(slots, weights, composition, even, fadings)

    def _pack(self, site: Site, stacked: Sequence[Stacked]) -> None:
        layer, reserve = submodule(self.components[site[0]], site[1]), self.reserved.get(site, 0)
        slot, parts = slot_of(layer), [one.part(site, layer) for one in stacked]
        if slot is not None and "_hf_hook" in vars(slot):  # accelerate would bring the rows it knows back
            take_off(layer)
            slot = None
        if slot is not None:
            slot.reserve = reserve
        if not parts and not reserve:
            if slot is not None:
                take_off(layer)
        elif slot is None:
            place(layer, Slot(layer, parts, reserve=reserve, gated=False))
        else:
            slot.pack(layer, parts)

    def _occupied(self, component: str, stacked: Sequence[Stacked]) -> dict[str, nn.Module]:
        """The layers of a component that adapters or the reserve are on, by name, in one order."""
        sites = {site for one in stacked for site in one.layers} | self.reserved.keys()
        names = sorted(name for at, name in sites if at == component)
        return {name: submodule(self.components[component], name) for name in names}
