"""Names for parts of a model: blocks, ranges of blocks, globs and module names -> layers.

down, mid, up, down.1          U-Nets
blocks.3, double.3, single.3   transformers; text encoders call their layers blocks too
blocks.0-9                     a range, both ends included
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_PATTERNS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"(?:^|\.)down_blocks\.(\d+)\."), ("down",)),
    (re.compile(r"(?:^|\.)up_blocks\.(\d+)\."), ("up",)),
    (re.compile(r"(?:^|\.)mid_block\.()"), ("mid",)),
    (re.compile(r"^single_transformer_blocks\.(\d+)\."), ("single",)),
    (re.compile(r"^transformer_blocks\.(\d+)\."), ("blocks", "double")),
    (re.compile(r"^(?:\w+\.)*?(?:blocks|block|layers)\.(\d+)\."), ("blocks",)),
)
_RANGE = re.compile(r"(.+)\.(\d+)-(\d+)")


def blocks_of(layer: str) -> tuple[str, ...]:
    """The block names a layer answers to: `down_blocks.1.resnets.0.conv1` -> ("down", "down.1")."""
    for pattern, names in _PATTERNS:
        if found := pattern.search(layer):
            return (*names, *(f"{name}.{int(found[1])}" for name in names if found[1]))
    return ()


def layers_of(pattern: str, layers: Iterable[str]) -> list[str]:
    """The layers that a block, range, glob, layer name or dotted beginning of one means; empty if none."""
    wanted = {pattern}
    if found := _RANGE.fullmatch(pattern):
        wanted = {f"{found[1]}.{number}" for number in range(int(found[2]), min(int(found[3]), 9999) + 1)}
    return [layer for layer in layers if _answers(layer, pattern, wanted)]


def known_blocks(layers: Iterable[str]) -> list[str]:
    """Every block name of a model, in its order."""
    return list(dict.fromkeys(name for layer in layers for name in blocks_of(layer)))


def _answers(layer: str, pattern: str, wanted: set[str]) -> bool:
    if not wanted.isdisjoint(blocks_of(layer)):
        return True
    return layer == pattern or layer.startswith(f"{pattern}.") or fnmatchcase(layer, pattern)
