"""A weight specification against the layers of a pipeline: which level every layer gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_diffusion.adapter import DENOISERS
from lora_diffusion.errors import TargetError, did_you_mean, some
from lora_diffusion.gates.blocks import known_blocks, layers_of
from lora_diffusion.gates.levels import Level, check_level
from lora_diffusion.gates.masks import Region

Weight = float | str | Callable[[float], float] | Region | Sequence[Any] | Mapping[str, Any]

#: short names of the components that a pipeline may have without an adapter for them
ALIASES = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}


@dataclass(frozen=True)
class Resolved:
    """The level of every (component, layer): `everywhere`, but where `sites` says otherwise."""

    everywhere: Level
    sites: Mapping[tuple[str, str], Level] = field(default_factory=dict)

    def at(self, component: str, layer: str) -> Level:
        """The level at one layer."""
        return self.sites.get((component, layer), self.everywhere) if self.sites else self.everywhere


def resolve_weight(weight: object, layers: Mapping[str, Sequence[str]], adapter: str) -> Resolved:
    """`weight` at each of the `layers` (component -> layer names) of a pipeline.

    ConfigError for what is no finite number, schedule, list or region; TargetError for a component, block or glob
    that names no layer.
    """
    if isinstance(weight, Mapping):
        return Resolved(0.0, _by_part(weight, layers, adapter))
    if isinstance(weight, list | tuple):
        parts = [resolve_weight(one, layers, adapter) for one in weight]
        sites = {site for part in parts for site in part.sites}
        whole = check_level([part.everywhere for part in parts], adapter)
        return Resolved(whole, {site: check_level([part.at(*site) for part in parts], adapter) for site in sites})
    if isinstance(weight, Region) and isinstance(weight.weight, Mapping):
        inside = resolve_weight(weight.weight, layers, adapter)
        regions = {id(level): check_level(weight.at(level), adapter) for level in inside.sites.values()}
        return Resolved(0.0, {site: regions[id(level)] for site, level in inside.sites.items()})
    return Resolved(check_level(weight, adapter))


def _by_part(
    weight: Mapping[str, Any], layers: Mapping[str, Sequence[str]], adapter: str
) -> dict[tuple[str, str], Level]:
    covered: list[tuple[list[tuple[str, str]], Resolved]] = []
    for key, value in weight.items():
        component, sites = _sites(str(key), layers, adapter)
        inside = {c: of for c, of in layers.items() if component in (None, c)}
        covered.append((sites, resolve_weight(value, inside, adapter)))
    levels: dict[tuple[str, str], Level] = {}
    for sites, resolved in sorted(covered, key=lambda part: -len(part[0])):  # the narrowest name wins
        levels |= {site: resolved.at(*site) for site in sites}
    return levels


def _sites(key: str, layers: Mapping[str, Sequence[str]], adapter: str) -> tuple[str | None, list[tuple[str, str]]]:
    """(the component a name begins with, every (component, layer) it covers)."""
    first, _, rest = key.partition(".")
    component = _component(first, layers)
    if component is not None:
        found = layers_of(rest, layers[component]) if rest else layers[component]
        sites = [(component, layer) for layer in found]
        if not rest:
            return component, sites
    else:
        sites = [(c, layer) for c, of in layers.items() for layer in layers_of(key, of)]
    if not sites:
        raise TargetError(_nothing(key, rest if component else key, component, layers, adapter))
    return component, sites


def _component(name: str, layers: Mapping[str, Sequence[str]]) -> str | None:
    if name == "denoiser":
        return next((component for component in DENOISERS if component in layers), None)
    name = name if name in layers else ALIASES.get(name, name)
    return name if name in layers else None


def _nothing(key: str, part: str, component: str | None, layers: Mapping[str, Sequence[str]], adapter: str) -> str:
    blocks = [name for c, of in layers.items() if component in (None, c) for name in known_blocks(of)]
    names = [name for c, of in layers.items() if component in (None, c) for name in of]
    hint = did_you_mean(part, [*([] if component else layers), *blocks]) or did_you_mean(part, names)
    there = f"components {', '.join(layers)} and blocks such as {some(dict.fromkeys(blocks))}"
    return f"adapter {adapter!r}: no component, block or layer {key!r}; there are {there}{hint}"
