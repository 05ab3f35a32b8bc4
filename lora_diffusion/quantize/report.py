"""What quantising a model did, layer by layer: stored as, why, parameters, bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lora_diffusion.sizes import size_of

__all__ = ["LayerCost", "QuantizationReport"]


@dataclass(frozen=True)
class LayerCost:
    """One module's own tensors: `stored` is nf4, int8 or a dtype; `bytes` include quantisation constants."""

    name: str
    kind: str
    stored: str
    reason: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class QuantizationReport:
    """Every module that holds tensors, in the model's order. `str()` gives a table by precision and reason."""

    precision: str
    layers: tuple[LayerCost, ...]

    @property
    def quantized(self) -> tuple[LayerCost, ...]:
        """Layers in 4 or 8 bits."""
        return tuple(layer for layer in self.layers if layer.stored in ("nf4", "int8"))

    @property
    def kept(self) -> tuple[LayerCost, ...]:
        """Everything else."""
        return tuple(layer for layer in self.layers if layer.stored not in ("nf4", "int8"))

    @property
    def bytes(self) -> int:
        """Bytes of all weights as they are stored now."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Numbers the model has, however they are stored."""
        return sum(layer.parameters for layer in self.layers)

    def groups(self) -> list[tuple[str, str, int, int, int]]:
        """(stored, reason, layers, parameters, bytes), the largest first."""
        rows: dict[tuple[str, str], list[int]] = {}
        for layer in self.layers:
            row = rows.setdefault((layer.stored, layer.reason), [0, 0, 0])
            row[:] = row[0] + 1, row[1] + layer.parameters, row[2] + layer.bytes
        table = [(*key, *numbers) for key, numbers in rows.items()]
        return sorted(table, key=lambda row: -row[4])  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        groups = [
            dict(zip(("stored", "reason", "layers", "parameters", "bytes"), row, strict=True)) for row in self.groups()
        ]
        return {
            "precision": self.precision,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "groups": groups,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        dense = max((layer.bytes / layer.parameters for layer in self.kept if layer.parameters), default=2.0)
        lines = [
            f"{self.precision}: {len(self.quantized)} layers quantised, {size_of(self.bytes)} "
            f"({size_of(round(dense * self.parameters))} unquantised)",
            f"{'stored as':<10}{'layers':>7}{'parameters':>16}{'size':>12}  why",
        ]
        lines += [
            f"{stored:<10}{layers:>7}{parameters:>16,}{size_of(size):>12}  {reason}"
            for stored, reason, layers, parameters, size in self.groups()
        ]
        return "\n".join(lines)
