"""What a file is, and what became of each of its tensors: used, unused and why, with a place on a model or without.

report = cover(load_adapter("style.safetensors", strict=False), pipe)
print(report)                       # a table
report.to_json()
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from lora_diffusion.adapter import Adapter, LayerAdapter
from lora_diffusion.errors import printable
from lora_diffusion.fitting import fit
from lora_diffusion.formats.assemble import rank_of
from lora_diffusion.formats.identity import settings_of, tool_of, trigger_words
from lora_diffusion.formats.provenance import family_for
from lora_diffusion.inspection.blocks import block_of, in_order


@dataclass(frozen=True)
class Row:
    """The layers of one block of one component. Alphas and ranks are counted: value -> layers that have it."""

    component: str
    block: str
    layers: int
    methods: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    alpha_sources: dict[str, int]
    parameters: int


@dataclass(frozen=True)
class CoverageReport:
    """What an adapter file is and what of it is used. Prints as a table; `to_json` for programs."""

    name: str
    spelling: str
    tool: str
    family: str
    why: str
    layers: int
    parameters: int
    content_hash: str
    rows: list[Row]
    tokens: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    trigger_words: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)  # tensor of the file -> why it is not used
    unplaced: dict[str, str] = field(default_factory=dict)  # layer -> why it finds no place on the model
    hashes: dict[str, str] = field(default_factory=dict)  # of the file, as other tools shorten and call them
    placed: int | None = None  # layers of the model that it changes; None where no model was asked

    @property
    def complete(self) -> bool:
        """Whether every tensor is used and, where a model was given, every layer has its place."""
        return not self.unused and not self.unplaced

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text, with `complete`."""
        return json.dumps({**asdict(self), "complete": self.complete}, indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> CoverageReport:
        """The report that `to_json` made this text of."""
        said: dict[str, Any] = json.loads(text)
        del said["complete"]  # follows from the rest
        said["rows"] = [Row(**row) for row in said["rows"]]
        return cls(**said)

    def __str__(self) -> str:
        console = Console(width=80, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._summary(), self._blocks() if self.rows else ""]
        lists = {
            "trained with": self.settings,
            f"not used: {len(self.unused):,}": self.unused,
            f"without a place: {len(self.unplaced):,}": self.unplaced,
        }
        for title, found in lists.items():
            if found:
                parts += [_pairs(title, dict(list(found.items())[:20])), ""]
        return Group(*parts)

    def _summary(self) -> Table:
        placed = "" if self.placed is None else f", {self.placed:,} layers of the model"
        tokens = [f"{token} ({', '.join(f'{c} {s}' for c, s in of.items())})" for token, of in self.tokens.items()]
        lines = {
            "family": f"{self.family}{f' – {self.why}' if self.why else ''}",
            "written by": f"{self.tool}, {self.spelling} spelling",
            "holds": f"{self.layers:,} layers, {self.parameters:,} parameters",
            "tokens": ", ".join(tokens),
            "trigger words": ", ".join(self.trigger_words),
            "content": self.content_hash[:16],
            "file": ", ".join(f"{name} {value}" for name, value in self.hashes.items() if name != "sha256"),
            "coverage": ("everything is used" if self.complete else "NOT everything is used") + placed,
        }
        return _pairs(self.name, {key: value for key, value in lines.items() if value})

    def _blocks(self) -> Table:
        table = bare_table("block", "layers", "method", "rank", "alpha (from)", "parameters")
        component = ""
        for row in self.rows:
            if row.component != component:
                component = row.component
                table.add_row(Text(component, style="bold"))
            alphas = f"{_counts(row.alphas)} ({_counts(row.alpha_sources)})" if row.alphas else "none"
            cells = (f"{row.layers:,}", _counts(row.methods), _counts(row.ranks), alphas, f"{row.parameters:,}")
            table.add_row(Text(f"  {printable(row.block)}"), *map(Text, cells))
        return table


def cover(adapter: Adapter, pipe: Any = None) -> CoverageReport:
    """What `adapter` is, and with `pipe` (a Diffusers pipeline or component -> model) where its layers go."""
    family = family_for(adapter)
    found = None if pipe is None else fit(adapter, _models(pipe))
    return CoverageReport(
        name=adapter.name,
        spelling=adapter.spelling or "none",
        tool=tool_of(adapter.metadata, adapter.spelling),
        family=family.name,
        why=family.why,
        layers=len(adapter),
        parameters=adapter.parameters,
        content_hash=adapter.content_hash,
        rows=_rows(adapter),
        tokens={t: {c: list(v.shape) for c, v in of.items()} for t, of in adapter.embeddings.items()},
        trigger_words=trigger_words(adapter.metadata),
        settings=settings_of(adapter.metadata),
        unused=dict(adapter.unused),
        unplaced={} if found is None else found.unplaced,
        placed=None if found is None else len(found.layers),
    )


def _models(pipe: Any) -> Mapping[str, nn.Module]:
    components = pipe if isinstance(pipe, dict) else pipe.components
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _rows(adapter: Adapter) -> list[Row]:
    groups: dict[tuple[str, str], list[LayerAdapter]] = {}
    for component, name, layer in adapter:
        groups.setdefault((component, block_of(name)), []).append(layer)
    order = sorted(groups, key=lambda group: (group[0], in_order(group[1])))
    return [_row(component, block, groups[component, block]) for component, block in order]


def _row(component: str, block: str, layers: list[LayerAdapter]) -> Row:
    def count(values: list[str]) -> dict[str, int]:
        return dict(Counter(values).most_common())

    return Row(
        component,
        block,
        len(layers),
        count([layer.method for layer in layers]),
        count([str(rank) for layer in layers if (rank := rank_of(layer.method, layer.tensors)) is not None]),
        count([f"{layer.alpha:g}" for layer in layers if layer.alpha is not None]),
        count([layer.alpha_source for layer in layers if layer.alpha is not None]),
        sum(tensor.numel() for layer in layers for tensor in layer.tensors.values()),
    )


def _counts(counts: Mapping[str, int], limit: int = 4) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} x{count}" for value, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f" and {len(counts) - limit} more" if len(counts) > limit else "")


def _pairs(title: str, pairs: Mapping[str, str]) -> Table:
    named = Text(printable(title), style="bold")
    table = Table(title=named, title_justify="left", show_header=False, box=None)
    for _ in range(2):
        table.add_column(overflow="fold")
    for key, value in pairs.items():
        table.add_row(Text(printable(key)), Text(printable(value)))
    return table


def bare_table(*columns: str, title: str = "") -> Table:
    """An empty table, the first column never cut, with no more lines than it needs to fit 80 characters."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title or None, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=not number)
    return table
