"""What can go wrong, as types.

    LoraDiffusionError
    ├── AdapterFileError      a file is broken, hostile, unknown or would be overwritten
    ├── AdapterMismatchError  an adapter does not fit a model
    ├── TargetError           a target, layer, component or registered name is unknown
    ├── ConfigError           a setting is unknown or has a wrong value
    └── DataError             pictures or captions cannot be used

Rooms add their own below these: a checkpoint that cannot be gone on from, a loss that is no number.
Every message names its subject (file, adapter, layer), what was found, what was expected and the
likely cause, in one sentence. The command line prints it alone and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LoraDiffusionError(Exception):
    """Base of every error this package raises on purpose."""


class AdapterFileError(LoraDiffusionError, ValueError):
    """A file is broken, hostile, of an unknown spelling, or would be overwritten."""


class AdapterMismatchError(LoraDiffusionError, ValueError):
    """An adapter does not fit the model it was put on."""


class TargetError(LoraDiffusionError, KeyError):
    """A target, layer, component or registered name is unknown."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument
        return str(self.args[0]) if self.args else ""


class ConfigError(LoraDiffusionError, ValueError):
    """A setting is unknown or has a value that cannot be."""


class DataError(LoraDiffusionError, ValueError):
    """Pictures or captions cannot be used."""


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """`" (did you mean 'a', 'b'?)"`, or `""` when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.55)
    return f" (did you mean {', '.join(map(repr, near))}?)" if near else ""


def some(names: Iterable[object], limit: int = 3) -> str:
    """At most `limit` of the names, and how many more there are: `"'a', 'b' and 5 more"`."""
    listed = [str(name) for name in names]
    shown = ", ".join(repr(name) for name in listed[:limit])
    return f"{shown} and {len(listed) - limit} more" if len(listed) > limit else shown


def printable(text: str) -> str:
    """Text of a file as a terminal may show it: what would steer the terminal, escaped; lines and tabs are kept."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def in_lines(names: Sequence[object], limit: int = 20) -> str:
    """At most `limit` of them, each on its own line, and how many more there are."""
    more = [f"… and {len(names) - limit} more"] if len(names) > limit else []
    return "".join(f"\n  {name}" for name in [*map(str, names[:limit]), *more])
