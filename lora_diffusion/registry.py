"""A named table of plugins: built-in entries, entry points from other packages, and no overwriting."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Generic, TypeVar

from lora_diffusion.errors import TargetError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """name -> plugin of one seam.

    Built-in entries are given as `"module:attribute"` and imported when first asked for; packages outside
    add theirs through the entry-point group `lora_diffusion.<seam>`, or by `add` at run time.
    """

    def __init__(self, seam: str, builtin: dict[str, str]) -> None:
        self.seam = seam
        self._paths = dict(builtin)
        self._loaded: dict[str, T] = {}
        self._looked_outside = False

    def add(self, name: str, plugin: T) -> T:
        """Register `plugin`; a name that is taken is an error."""
        if name in self:
            raise TargetError(f"{self.seam}: {name!r} is registered already; choose another name")
        self._loaded[name] = plugin
        return plugin

    def remove(self, name: str) -> None:
        """Take a plugin that `add` registered out again."""
        del self._loaded[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._loaded:
            if name not in self:
                raise TargetError(f"{self.seam}: no {name!r}; there are {', '.join(self)}{did_you_mean(name, self)}")
            module, _, attribute = self._paths[name].partition(":")
            self._loaded[name] = getattr(import_module(module), attribute)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        self._look_outside()
        return iter([*self._paths, *(name for name in self._loaded if name not in self._paths)])

    def __contains__(self, name: object) -> bool:
        self._look_outside()
        return name in self._paths or name in self._loaded

    def values(self) -> list[T]:
        """Every plugin, imported."""
        return [self[name] for name in self]

    def _look_outside(self) -> None:
        if self._looked_outside:
            return
        self._looked_outside = True
        from importlib.metadata import entry_points  # 0.1 s that a header's reader does not need

        for point in entry_points(group=f"lora_diffusion.{self.seam}"):
            if point.name in self._paths or point.name in self._loaded:
                raise TargetError(f"{self.seam}: {point.value} wants the name {point.name!r}, which is taken")
            self._paths[point.name] = point.value
