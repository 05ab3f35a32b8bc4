"""Where an adapter's layers go on live models, and why some of them cannot. Changes nothing.

The stack refuses an adapter that does not fit, or leaves out what does not; a coverage report says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lora_diffusion.adapter import Adapter, LayerAdapter, not_finite
from lora_diffusion.attachment import fault_of
from lora_diffusion.errors import AdapterMismatchError, some
from lora_diffusion.families.control import control_hint
from lora_diffusion.families.homes import homes
from lora_diffusion.families.naming import Resolution, resolve
from lora_diffusion.layers import submodule

Site = tuple[str, str]  # component, live layer name


@dataclass
class Fit:
    """Layers by their place; the others by "component.name" as the file has it, with the reason."""

    layers: dict[Site, LayerAdapter] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)  # no layer is called like that
    faults: dict[str, str] = field(default_factory=dict)  # one is, and it does not fit

    @property
    def unplaced(self) -> dict[str, str]:
        """Everything without a place, with the reason."""
        return self.unmatched | self.faults

    def check(self, adapter: Adapter, models: Mapping[str, nn.Module]) -> None:
        """AdapterMismatchError unless every layer has its place."""
        if self.unmatched:
            share = f"{len(self.unmatched)} of {len(adapter)} layers find no place"
            live = ", ".join(f"{name} ({type(model).__name__})" for name, model in models.items())
            why = "probably trained for another model family"
            raise AdapterMismatchError(f"adapter {adapter.name!r}: {share} on {live}: {some(self.unmatched)}; {why}")
        self._refuse(adapter)

    def check_any(self, adapter: Adapter) -> None:
        """AdapterMismatchError where there are layers and none of them has a place."""
        if len(adapter) and not self.layers:
            self._refuse(adapter, f"none of its {len(adapter)} layers fits: ")

    def _refuse(self, adapter: Adapter, what: str = "") -> None:
        for name, fault in self.unplaced.items():
            component, _, layer = name.partition(".")
            more = f" ({len(self.unplaced) - 1} more like it)" if len(self.unplaced) > 1 else ""
            raise AdapterMismatchError(f"adapter {adapter.name!r}: {what}{component} {layer}: {fault}{more}")


def fit(adapter: Adapter, models: Mapping[str, nn.Module], *, finite: bool = False) -> Fit:
    """Find every layer of `adapter` its place on `models` (component -> model), names, shapes and values checked.

    `finite`: the values are known to be, and are not read again. A layer of the file that several live ones share has
    a place on all of them or on none.
    """
    found = Fit()
    for component, (home, resolution) in _resolved(adapter, models).items():
        if resolution is None:
            why = f"the pipeline has no {component}"
            found.unmatched |= {f"{component}.{name}": why for name in adapter.layers[component]}
            continue
        model = models[home]
        why = f"no layer of {type(model).__name__} is called like that"
        found.unmatched |= {f"{component}.{name}": why for name in resolution.unmatched}
        faults = resolution.faults | _faults(resolution, model, finite)
        found.faults |= {f"{component}.{name}": fault for name, fault in faults.items()}
        placed = {t: layer for t, layer in resolution.layers.items() if resolution.origins[t] not in faults}
        found.layers |= {(home, target): layer for target, layer in placed.items()}
    return found


def _resolved(adapter: Adapter, models: Mapping[str, nn.Module]) -> dict[str, tuple[str, Resolution | None]]:
    """Component -> component of the pipeline, and the layers there; None where the pipeline has no such component."""
    found: dict[str, tuple[str, Resolution | None]] = {}
    for component, layers in adapter.layers.items():
        model = models.get(component)
        found[component] = (component, None if model is None else resolve(layers, model, strict=False))
    strays = {c: adapter.layers[c] for c, (_, there) in found.items() if there is None or not there.origins}
    free = {name: model for name, model in models.items() if name not in found or name in strays}
    for component, home in homes(strays, free).items() if strays else ():
        if home != component:
            found[component] = (home, resolve(strays[component], models[home], strict=False))
    return found


def _faults(resolution: Resolution, model: nn.Module, finite: bool) -> dict[str, str]:
    faults: dict[str, str] = {}
    for target, layer in resolution.layers.items():
        origin = resolution.origins[target]
        fault = fault_of(layer, submodule(model, target)) or (None if finite else not_finite(layer))
        if fault and origin not in faults:
            fault += control_hint(model, target, layer)
            faults[origin] = fault if origin == target else f"{fault} ({target})"
    return faults
