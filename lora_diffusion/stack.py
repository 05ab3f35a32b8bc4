"""AdapterStack: weighted adapters on a Diffusers pipeline, all or nothing, and off without a trace.

with AdapterStack(pipe) as stack:
    stack.add("style.safetensors", weight=0.8)
    stack.add("kiki.safetensors", weight={"unet": 1.0, "text_encoder": 0.5})
    stack.weigh("style", "0@0,1@0.5")                  # what a weight can be: lora_diffusion/gates
    image = pipe("kiki riding a bike").images[0]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from lora_diffusion.adapter import DENOISERS, Adapter, LayerAdapter
from lora_diffusion.clock import Clock
from lora_diffusion.composing import Composition
from lora_diffusion.dial import Dial
from lora_diffusion.errors import ConfigError, TargetError, did_you_mean, some
from lora_diffusion.fitting import Fit, Site, fit
from lora_diffusion.fusing import Fusion, fuse
from lora_diffusion.gates import Resolved, Weight, resolve_weight
from lora_diffusion.gates.fading import fading_of
from lora_diffusion.layers import is_adaptable, submodule
from lora_diffusion.leaving import Hold
from lora_diffusion.lora import Slot
from lora_diffusion.resident import Residents
from lora_diffusion.seating import Seating, hosts_of, inner
from lora_diffusion.stacked import Stacked
from lora_diffusion.targets import Targets
from lora_diffusion.tokens import Vocabulary


class AdapterStack:
    """Adapters on one pipeline. Iterating gives their names in the order they were added.

    Where nobody holds the stack any more, or the pipeline was copied alone, they act on until the next takes them off.
    """

    def __init__(self, pipe: Any) -> None:
        self._vocabulary = Vocabulary(pipe)  # first: a copy of the stack begins with the pipeline, as the clocks need
        hosts = hosts_of(pipe)
        self.components = {name: inner(host) for name, host in hosts.items()}
        clock = Clock(pipe)
        self._dials = {n: Dial(n, host, clock if n in DENOISERS else None) for n, host in hosts.items()}
        self._stacked: dict[str, Stacked] = {}
        self._seating = Seating(self.components, self._dials)
        self.residents: Residents[Fit] = Residents(partial(_plan, self.components))
        self._fusion: Fusion | None = None
        self.composition = Composition()
        self._hold = Hold(self.components, self._dials, self._vocabulary)
        self._begin()

    def reserve(self, rank: int, targets: Targets = "all-linear", *, component: str = "denoiser") -> None:
        """Put empty slots of at least `rank` rows on the target layers, once, before `torch.compile`.

        Weights then change, and adapters come and go within the reserve, without a recompilation. `clear` keeps
        the reserve; `release` gives it up. TargetError for an unknown component or target, norms and attentions.
        """
        self._begin()
        given: Any = rank
        if not isinstance(given, int) or rank < 1:
            raise ConfigError(f"reserve: rank is {rank!r}; expected a number of rows, at least 1")
        name = next((n for n in DENOISERS if n in self.components), component) if component == "denoiser" else component
        if name not in self.components:
            raise TargetError(f"no component {name!r}; there are {', '.join(self.components)}")
        self._seat(self._seating.reserve(name, targets, rank))

    def release(self) -> None:
        """Give the reserve up; layers without an adapter are as they were."""
        self._begin()
        sites, self._seating.reserved = self._seating.reserved, {}
        self._seat(sites)

    def add(
        self, adapter: Adapter | str | Path, weight: Weight = 1.0, *, name: str | None = None, strict: bool = True
    ) -> str:
        """Put an adapter (or the file of one) on the pipeline; returns its name in the stack.

        Everything is checked before anything is changed: AdapterFileError for a bad file,
        AdapterMismatchError where a layer or a shape does not fit, TargetError for a name that is taken.
        Not strict, what cannot be used is left out and stands in `left_out`; an adapter of which nothing fits is an
        error either way. Tokens that the adapter carries are added to tokenizers and text encoders until it goes.
        """
        new = self._checked(adapter, weight, name, strict, list(self._stacked.values()))
        self._become([*self._stacked.values(), new], new.layers, new.adapter.embeddings)
        return new.name

    def swap(
        self,
        old: str,
        adapter: Adapter | str | Path,
        weight: Weight | None = None,
        *,
        name: str | None = None,
        strict: bool = True,
    ) -> str:
        """Put an adapter in the place of another, all or nothing; the weight stays unless one is given.

        As `remove` and `add` in one go. Where both have the same ranks on the same layers, their rows are copied over
        the others', from the host's memory where the adapter was met before. Raises what `add` raises.
        """
        gone = self._stacked[self._known(old)]
        others = [stacked for stacked in self._stacked.values() if stacked is not gone]
        new = self._checked(adapter, gone.weight if weight is None else weight, name, strict, others)
        wanted = [new if name == old else stacked for name, stacked in self._stacked.items()]
        self._become(wanted, gone.layers | new.layers, gone.adapter.embeddings or new.adapter.embeddings)
        return new.name

    def remove(self, name: str) -> None:
        """Take one adapter off; layers it alone sat on are as they were."""
        self._begin()
        gone = self._stacked[self._known(name)]
        self._become([one for one in self._stacked.values() if one is not gone], gone.layers, gone.adapter.embeddings)

    def clear(self) -> None:
        """Take everything off; the pipeline is bit-identical to what it was."""
        self.unfuse()
        self._begin()
        self._empty()
        self._vocabulary.set([])

    def weigh(self, name: str, weight: Weight) -> None:
        """Turn one adapter to another strength; ConfigError or TargetError, and nothing changed, for a bad one."""
        self.weigh_all({name: weight})

    def weigh_all(self, weights: Mapping[str, Weight]) -> None:
        """Turn several adapters at once (name -> weight), or none of them."""
        self._begin()
        resolved = {name: self._resolve(w, self._known(name)) for name, w in weights.items()}
        for name, weight in weights.items():
            self._stacked[name].weight, self._stacked[name].resolved = weight, resolved[name]
        for dial in self._dials.values():
            dial.turn(resolved)

    def compose(self, mode: str = "sum", *, every: int = 5, balance: bool = False) -> None:
        """How the adapters act together in the denoiser: "sum", "switch" (`every` steps each) or "composite".

        `balance` brings all adapters of a layer to one Frobenius norm first; weights then act on equal terms. Costs
        and formulas are in `composing.py`. It holds for adapters that come later too. ConfigError for another mode.
        """
        self._begin()
        self.composition = Composition(mode, every, balance)
        for component, dial in self._dials.items():
            self._seating.bind(component, dial.slots, list(self._stacked.values()), self.composition)

    def fuse(self) -> None:
        """Write the weighted sum into the weights: no cost a call. The originals are kept for `unfuse`.

        ConfigError for weights by step, image or place, and for 4- and 8-bit layers, which would lose most of it.
        """
        self._begin()
        if self.composition.mode != "sum":
            raise ConfigError(f"fuse: the stack composes by {self.composition.mode}, step by step; fusing is a sum")
        if any(not isinstance(e.level, float) or e.fading for dial in self._dials.values() for e in dial.entries):
            raise ConfigError("fuse: a weight changes by step, image or place, and a fused one cannot; weigh first")
        self._fusion = fuse(
            {
                f"{c}.{name}": (submodule(self.components[c], name), slot, self.shares(c, name))
                for c, dial in self._dials.items()
                for name, slot in dial.slots.items()
            }
        )

    def unfuse(self) -> None:
        """Bring the original weights back, bit for bit; nothing if none are fused."""
        if self._fusion is not None:
            self._fusion.undo()
            self._fusion = None
            for dial in self._dials.values():
                dial.wake()

    def bake(self) -> None:
        """Write the weighted sum into the weights for good and take the adapters off; their tokens stay."""
        self.fuse()
        self._fusion = None
        self._empty()
        self.release()

    @property
    def slots(self) -> dict[str, dict[str, Slot]]:
        """component -> layer name -> what sits there."""
        return {component: dict(dial.slots) for component, dial in self._dials.items()}

    def shares(self, component: str, layer: str) -> dict[str, LayerAdapter]:
        """adapter -> its share of one layer."""
        return {n: one.layers[component, layer] for n, one in self._stacked.items() if (component, layer) in one.layers}

    def content_hash(self, name: str) -> str:
        """The content hash of an adapter on the stack, taken when it is first needed."""
        return self._stacked[self._known(name)].met.key

    def left_out(self, name: str) -> dict[str, str]:
        """What of an adapter is not on the pipeline, tensor or layer of its file -> why: empty if it came strictly.

        `lora_diffusion.inspection.coverage.cover(stack[name], pipe)` makes a report of it.
        """
        return dict(self._stacked[self._known(name)].left_out)

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
        self.release()

    def __del__(self) -> None:
        if not sys.is_finalizing() and "_hold" in vars(self):
            self._hold.leave(list(self))

    def __repr__(self) -> str:
        rows = [f"  {s.name!r} at {s.weight}: {len(s.layers)} layers" for s in self._stacked.values()]
        mode = "" if self.composition == Composition() else f", {self.composition}"
        return "\n".join([f"AdapterStack({len(rows)} adapters on {', '.join(self.components)}{mode})", *rows])

    def _known(self, name: str) -> str:
        if name not in self._stacked:
            there = ", ".join(map(repr, self._stacked)) or "none"
            raise TargetError(f"no adapter {name!r} in the stack; there are {there}{did_you_mean(name, self._stacked)}")
        return name

    def _checked(
        self, adapter: Adapter | str | Path, weight: Weight, name: str | None, strict: bool, others: list[Stacked]
    ) -> Stacked:
        """An adapter that can come beside the others; nothing is changed."""
        self._begin()
        adapter = self.residents.read(adapter, strict=strict)
        name = adapter.name if name is None else name
        if any(stacked.name == name for stacked in others):
            raise TargetError(f"an adapter {name!r} is on already; give the second one another name=")
        met, resolved = self.residents.meet(adapter), self._resolve(weight, name)
        found = met.plan
        found.check(adapter, self.components) if strict else found.check_any(adapter)
        self._seating.check(found.layers)
        self._vocabulary.check(adapter.embeddings, (s.adapter.embeddings for s in others), name)
        left_out = {} if strict else adapter.unused | found.unplaced
        return Stacked(name, adapter, weight, resolved, met, left_out, fading=fading_of(adapter.metadata, name))

    @cached_property
    def _layers(self) -> dict[str, list[str]]:
        """Names of all layers that an adapter can be on, norms and whole attentions too, by component."""
        return {
            component: [name for name, layer in model.named_modules() if is_adaptable(layer)]
            for component, model in self.components.items()
        }

    def _seat(self, sites: Collection[Site], tokens: object = None) -> None:
        self._seating.seat(sites, list(self._stacked.values()), self.composition)
        if tokens:
            self._vocabulary.set(stacked.adapter.embeddings for stacked in self._stacked.values())

    def _resolve(self, weight: Weight, name: str) -> Resolved:
        by_name = not isinstance(weight, float | int | str)  # only then do the layers' names matter
        return resolve_weight(weight, self._layers if by_name else {}, name)

    def _empty(self) -> None:
        self._become([], {site for stacked in self._stacked.values() for site in stacked.layers}, tokens=None)

    def _become(self, wanted: Iterable[Stacked], sites: Collection[Site], tokens: object) -> None:
        """Have these adapters, which differ on `sites`, and their tokens if there are any; else those of before."""
        before, self._stacked = self._stacked, {one.name: one for one in wanted}
        try:
            self._seat(sites, tokens)
        except BaseException:  # no memory left, say
            self._stacked = before
            self._seat(sites, tokens)
            raise

    def _begin(self) -> None:
        """Before any change: ConfigError while fused; what a stack that is gone left is taken off."""
        if self._fusion is not None:
            raise ConfigError("the stack is fused into the weights; call unfuse() first")
        if left := self._hold.take_off_left():
            warnings.warn(f"{some(left)} of an AdapterStack that is gone taken off; hold it to keep them", stacklevel=3)


def _plan(components: Mapping[str, nn.Module], adapter: Adapter, finite: bool) -> Fit:
    adapter.check_content()
    return fit(adapter, components, finite=finite)
