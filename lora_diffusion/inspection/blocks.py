"""The block that a layer belongs to, from its name in any spelling."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(mid_block|middle_block)|((?:\w+[._])??\w*?(?:blocks|layers|block))[._](\d+)")


def block_of(name: str) -> str:
    """ "down_blocks.1", "double_blocks.7", "mid_block" …; "other" for layers outside any block."""
    if name.startswith("#"):
        return "numbered"
    found = _BLOCK.match(name.removeprefix("text_model.").removeprefix("text_model_"))
    if not found:
        return "other"
    return found[1] or f"{found[2]}.{found[3]}"


def in_order(block: str) -> list[tuple[int, str]]:
    """Sort key under which block 10 comes after block 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", block)]
