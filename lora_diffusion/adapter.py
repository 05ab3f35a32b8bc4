"""The neutral form of an adapter: component -> layer -> tensors, with embeddings and metadata.

Formats read files into it and write it out; methods give its tensors a meaning; the stack puts it on a
pipeline. It never touches a model, and nothing here knows a file's spelling.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_diffusion.errors import AdapterFileError, some


class Digest(Protocol):
    """What hashlib's objects can do."""

    def update(self, data: bytes, /) -> None:
        """Feed bytes."""
        ...


AlphaSource = Literal["tensor", "metadata", "assumed", "none"]

#: components that hold a pipeline's denoiser; a weight spec may call any of them "denoiser"
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True, eq=False)
class LayerAdapter:
    """One layer's share of an adapter.

    `tensors` are named and shaped as the method declares; for `lora`: `down` (rank, in[, kh, kw]) and `up`
    (out, rank[, 1, 1]), as LoRA files store them. `alpha` is None where the method has none. rsLoRA is
    kept as `alpha * sqrt(rank)`, so that `alpha / rank` is always the scale.
    """

    method: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    alpha_source: AlphaSource = "none"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerAdapter):
            return NotImplemented
        return (
            (self.method, self.alpha) == (other.method, other.alpha)
            and self.tensors.keys() == other.tensors.keys()
            and all(_same_bits(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]  # compares by value, and tensors can change

    def copy(self) -> LayerAdapter:
        """The same in memory of its own."""
        return replace(self, tensors={name: tensor.clone() for name, tensor in self.tensors.items()})

    def cast(self, to: torch.dtype | torch.device) -> LayerAdapter:
        """The same with its floating tensors in another dtype, or on another device; the rest stays as it is."""
        cast = {name: t.to(to) if t.is_floating_point() else t for name, t in self.tensors.items()}
        return replace(self, tensors=cast)


@dataclass(eq=False)
class Adapter:
    """One file's worth: what was trained, what it is called and what the file says about itself.

    `layers` maps a component ("unet", "transformer", "text_encoder", "text_encoder_2", …) to its layers by
    name: dotted names of the Diffusers model where the file has them, else the file's own flattened or
    original names, which are resolved against the live model when the adapter goes on. `embeddings` maps a
    token ("<s1>") to its vectors by text-encoder component, each (n, width). `spelling` names the format it
    was read in, `unused` the file's tensors that are not in here, with the reason. Two adapters are equal when
    components, layers (as `same_layer` compares them), tensors (to the bit), alphas and embeddings are.
    """

    name: str
    layers: dict[str, dict[str, LayerAdapter]]
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    source: Path | None = None
    spelling: str = ""
    unused: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, str, LayerAdapter]]:
        """(component, layer name, layer adapter), in the file's order."""
        for component, layers in self.layers.items():
            for name, layer in layers.items():
                yield component, name, layer

    def __len__(self) -> int:
        return sum(len(layers) for layers in self.layers.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        return (
            _by_flat_name(self.layers) == _by_flat_name(other.layers)
            and self.embeddings.keys() == other.embeddings.keys()
            and all(
                vectors.keys() == other.embeddings[token].keys()
                and all(_same_bits(v, other.embeddings[token][c]) for c, v in vectors.items())
                for token, vectors in self.embeddings.items()
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = ", ".join(f"{component}: {len(layers)} layers" for component, layers in self.layers.items())
        tokens = f", tokens {', '.join(self.embeddings)}" if self.embeddings else ""
        return f"Adapter({self.name!r}, {parts or 'no layers'}, {self.parameters:,} parameters{tokens})"

    @property
    def parameters(self) -> int:
        """Numbers stored, embeddings included."""
        tensors = [t for *_, layer in self for t in layer.tensors.values()]
        tensors += [v for vectors in self.embeddings.values() for v in vectors.values()]
        return sum(tensor.numel() for tensor in tensors)

    @property
    def methods(self) -> set[str]:
        """Names of the methods in use."""
        return {layer.method for *_, layer in self}

    @property
    def content_hash(self) -> str:
        """SHA-256 of layers and embeddings (names, methods, alphas, tensor bytes), whatever the spelling or order."""
        digest = hashlib.sha256()
        for component, layers in sorted(_by_flat_name(self.layers).items()):
            for name, layer in sorted(layers.items()):
                alpha = None if layer.alpha is None else float(layer.alpha)
                digest.update(f"{component}/{name}/{layer.method}/{alpha}".encode())
                for key, tensor in sorted(layer.tensors.items()):
                    _update(digest, key, tensor)
        for token, vectors in sorted(self.embeddings.items()):
            for component, vector in sorted(vectors.items()):
                _update(digest, f"{token}/{component}", vector)
        return digest.hexdigest()

    def renamed(self, name: str) -> Adapter:
        """The same adapter under another name (tensors are shared)."""
        return replace(self, name=name)

    def check_content(self) -> None:
        """Raise AdapterFileError for an adapter without a layer and without an embedding."""
        if not len(self) and not self.embeddings:
            raise AdapterFileError(f"adapter {self.name!r} holds no layer and no embedding")

    def check(self) -> None:
        """Raise AdapterFileError for an adapter without content, a non-finite value or a non-finite alpha."""
        self.check_content()
        bad = [f"{c} {n}: {fault}" for c, of in self.layers.items() for n, fault in not_finite_layers(of).items()]
        bad += [
            f"{token} {component}: it holds values that are not finite numbers"
            for token, vectors in self.embeddings.items()
            for component, vector in vectors.items()
            if not is_finite(vector)
        ]
        if bad:
            more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
            raise AdapterFileError(f"adapter {self.name!r}: {bad[0]}{more}")


def not_finite(layer: LayerAdapter) -> str | None:
    """What of a layer is no finite number, as a sentence; None where all is."""
    if layer.alpha is not None and not math.isfinite(layer.alpha):
        return f"alpha is {layer.alpha}"
    bad = [part for part, tensor in layer.tensors.items() if not is_finite(tensor)]
    return f"{some(bad)} holds values that are not finite numbers" if bad else None


def flat(name: str) -> str:
    """A layer name as kohya's tools flatten it: `down_blocks.0.conv` -> `down_blocks_0_conv`."""
    return name.replace(".", "_")


def same_layer(name: str) -> str:
    """What all spellings of one layer share: flattened, without the `text_model.` level of older CLIP encoders."""
    return flat(name).removeprefix("text_model_")


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is a finite number (one pass, no copy of the tensor's size)."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # no reduction is defined on 8-bit floats
    low, high = torch.aminmax(tensor)  # both carry a NaN through
    return math.isfinite(low.item()) and math.isfinite(high.item())


def not_finite_layers(layers: Mapping[str, LayerAdapter], *, sure: bool = False) -> dict[str, str]:
    """The layers that hold something that is no finite number, with what that is. `sure`: the tensors are not read."""
    if sure or _surely_finite(tensor for layer in layers.values() for tensor in layer.tensors.values()):
        layers = {name: layer for name, layer in layers.items() if not math.isfinite(layer.alpha or 0.0)}
    return {name: fault for name, layer in layers.items() if (fault := not_finite(layer))}


def _surely_finite(tensors: Iterable[Tensor]) -> bool:
    """One pass over what they span in each memory they share, as a file's do; False where each must tell for itself."""
    spans: dict[tuple[int, torch.dtype], tuple[Tensor, int, int, int]] = {}
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.is_meta:
            return False
        begin, length = int(tensor.storage_offset()), tensor.numel()
        key = (tensor.untyped_storage().data_ptr(), tensor.dtype)
        one, low, high, numbers = spans.get(key, (tensor, begin, begin, 0))
        spans[key] = one, min(low, begin), max(high, begin + length), numbers + length
    dense = all(2 * numbers >= high - low for _, low, high, numbers in spans.values())
    return dense and all(is_finite(one.as_strided((high - low,), (1,), low)) for one, low, high, _ in spans.values())


def _by_flat_name(layers: dict[str, dict[str, LayerAdapter]]) -> dict[str, dict[str, LayerAdapter]]:
    return {
        component: {same_layer(name): layer for name, layer in of.items()} for component, of in layers.items() if of
    }


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def _update(digest: Digest, key: str, tensor: Tensor) -> None:
    digest.update(f"{key}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
