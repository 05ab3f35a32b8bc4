"""Bytes as people read them."""

from __future__ import annotations

GIB = 2**30


def size_of(count: float) -> str:
    """`count` bytes as "1.50 GiB", or below a tenth of one as "12.00 MiB"."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"
