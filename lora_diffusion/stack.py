"""AdapterStack: weighted adapters on a Diffusers pipeline, all or nothing, and off without a trace.

with AdapterStack(pipe) as stack:
    stack.add("style.safetensors", weight=0.8)
    stack.add("kiki.safetensors", weight={"unet": 1.0, "text_encoder": 0.5})
    image = pipe("kiki riding a bike").images[0]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.attachment import check_layers
from lora_diffusion.errors import AdapterMismatchError, TargetError, did_you_mean, some
from lora_diffusion.families.naming import resolve
from lora_diffusion.formats.files import load_adapter
from lora_diffusion.gates import Weight, check_weight, weight_of
from lora_diffusion.lora import Slot, place, slot_of, take_off
from lora_diffusion.methods import METHODS

Site = tuple[str, str]  # component, live layer name


@dataclass
class Stacked:
    """One adapter of a stack: what it is, how strong, and where it sits."""

    name: str
    adapter: Adapter
    weight: Weight
    layers: dict[Site, LayerAdapter]
    key: str  # content hash: the canonical order, so that stacking commutes


class AdapterStack:
    """Adapters on one pipeline. Iterating gives their names in the order they were added."""

    def __init__(self, pipe: Any) -> None:
        self.components = {n: c for n, c in _components(pipe).items() if isinstance(c, nn.Module)}
        self._stacked: dict[str, Stacked] = {}

    def add(self, adapter: Adapter | str | Path, weight: Weight = 1.0, *, name: str | None = None) -> str:
        """Put an adapter (or the file of one) on the pipeline; returns its name in the stack.

        Everything is checked before anything is changed: AdapterFileError for a bad file,
        AdapterMismatchError where a layer or a shape does not fit, TargetError for a name that is taken.
        """
        adapter = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
        name = adapter.name if name is None else name
        if name in self._stacked:
            raise TargetError(f"an adapter {name!r} is on already; give the second one another name=")
        check_weight(weight, self.components, name)
        layers = self._plan(adapter)
        self._stacked[name] = Stacked(name, adapter, weight, layers, adapter.content_hash)
        self._repack(layers)
        return name

    def remove(self, name: str) -> None:
        """Take one adapter off; layers it alone sat on are as they were."""
        stacked = self._stacked.pop(self._known(name))
        self._repack(stacked.layers)

    def clear(self) -> None:
        """Take everything off; the pipeline is bit-identical to what it was."""
        sites = {site for stacked in self._stacked.values() for site in stacked.layers}
        self._stacked.clear()
        self._repack(dict.fromkeys(sites))

    def weigh(self, name: str, weight: Weight) -> None:
        """Turn one adapter to another strength."""
        stacked = self._stacked[self._known(name)]
        check_weight(weight, self.components, name)
        stacked.weight = weight
        self._reweigh(stacked.layers)

    @property
    def weights(self) -> dict[str, Weight]:
        """name -> weight, in the order they were added."""
        return {name: stacked.weight for name, stacked in self._stacked.items()}

    def __getitem__(self, name: str) -> Adapter:
        return self._stacked[self._known(name)].adapter

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._stacked))

    def __len__(self) -> int:
        return len(self._stacked)

    def __enter__(self) -> AdapterStack:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()

    def __repr__(self) -> str:
        rows = [f"  {s.name!r} at {s.weight}: {len(s.layers)} layers" for s in self._stacked.values()]
        return "\n".join([f"AdapterStack({len(rows)} adapters on {', '.join(self.components)})", *rows])

    def _known(self, name: str) -> str:
        if name not in self._stacked:
            there = ", ".join(map(repr, self._stacked)) or "none"
            raise TargetError(f"no adapter {name!r} in the stack; there are {there}{did_you_mean(name, self._stacked)}")
        return name

    def _plan(self, adapter: Adapter) -> dict[Site, LayerAdapter]:
        """Where every layer goes, shapes checked. Changes nothing."""
        adapter.check()
        planned: dict[Site, LayerAdapter] = {}
        unmatched: list[str] = []
        faults: list[str] = []
        for component, layers in adapter.layers.items():
            model = self.components.get(component)
            if model is None:
                unmatched += [f"{component}.{name}" for name in layers]
                continue
            resolution = resolve(layers, model)
            unmatched += [f"{component}.{name}" for name in resolution.unmatched]
            faults += check_layers(component, resolution.layers, model)
            planned |= {(component, name): layer for name, layer in resolution.layers.items()}
        if unmatched:
            raise AdapterMismatchError(_unmatched(adapter, unmatched, self.components))
        if faults:
            more = f" ({len(faults) - 1} more like it)" if len(faults) > 1 else ""
            raise AdapterMismatchError(f"adapter {adapter.name!r}: {faults[0]}{more}")
        return planned

    def _repack(self, sites: dict[Site, Any]) -> None:
        for component, layer_name in sites:
            layer = self.components[component].get_submodule(layer_name)
            parts = [METHODS[s.method].part(name, s, layer) for name, s in self._on((component, layer_name))]
            slot = slot_of(layer)
            if not parts:
                take_off(layer)
            elif slot is None:
                place(layer, Slot(layer, parts))
            else:
                slot.pack(layer, parts)
        self._reweigh(sites)

    def _reweigh(self, sites: dict[Site, Any]) -> None:
        by_component = {
            component: {name: weight_of(stacked.weight, component) for name, stacked in self._stacked.items()}
            for component in {component for component, _ in sites}
        }
        for component, layer_name in sites:
            slot = slot_of(self.components[component].get_submodule(layer_name))
            if slot is not None:
                slot.weigh(by_component[component])

    def _on(self, site: Site) -> list[tuple[str, LayerAdapter]]:
        stacked = sorted((s for s in self._stacked.values() if site in s.layers), key=lambda s: (s.key, s.name))
        return [(s.name, s.layers[site]) for s in stacked]


def _components(pipe: Any) -> dict[str, Any]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TargetError(f"{type(pipe).__name__} is no Diffusers pipeline: it has no components")
    return components


def _unmatched(adapter: Adapter, unmatched: list[str], components: dict[str, nn.Module]) -> str:
    share = f"{len(unmatched)} of {len(adapter)} layers find no place"
    live = ", ".join(f"{name} ({type(model).__name__})" for name, model in components.items())
    return f"adapter {adapter.name!r}: {share} on {live}: {some(unmatched)}; probably trained for another model family"
