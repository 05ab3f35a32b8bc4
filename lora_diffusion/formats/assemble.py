"""Named tensors of a file -> layers of the neutral form: grouping, pairs, and where each alpha comes from.

Shared by the spellings that name a layer in every key. It knows which tensors belong together and which of
their axes is the rank; what they mean is the methods' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_diffusion.adapter import AlphaSource, LayerAdapter, same_layer
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats import Parsed
from lora_diffusion.formats.embeddings import take_embeddings
from lora_diffusion.formats.keys import DENOISER, Key, denoiser_of, is_flux, refused, split

#: (component, layer, rank) -> alpha that the file's metadata gives that layer (rsLoRA folded in), None if silent
AlphaOf = Callable[[str, str, int], float | None]

#: method -> the sets of tensors of which one must be whole
_WHOLE: dict[str, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({"down", "up"}),),
    "biased": (frozenset({"down", "up"}),),
    "dora": (frozenset({"down", "up", "magnitude"}),),
    "locon": (frozenset({"down", "mid", "up"}),),
    "loha": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    "lokr": tuple(
        frozenset(first | second) for first in ({"w1"}, {"w1_a", "w1_b"}) for second in ({"w2"}, {"w2_a", "w2_b"})
    ),
    "ia3": (frozenset({"weight", "on_input"}),),
    "oft": tuple(frozenset({part}) for part in ("blocks", "blocks.0", "diag", "R")),
    "vera": (frozenset({"d", "b", "projection"}),),
    "bottleneck": (frozenset({"down", "down_bias", "up", "up_bias"}),),
    "tlora": (frozenset({"down", "sigma", "up"}),),
    "prefix": (frozenset({"k", "v"}),),
    "glora": (frozenset({"a1", "a2", "b1", "b2"}),),
    "full": (frozenset({"diff"}), frozenset({"diff_b"})),
    "norm": (frozenset({"w_norm"}), frozenset({"b_norm"})),
    "set": (frozenset({"value"}),),
}
#: method -> sets of tensors of which a layer may have one alone
_EITHER: dict[str, tuple[tuple[set[str], set[str]], ...]] = {
    "lokr": (({"w1"}, {"w1_a", "w1_b"}), ({"w2"}, {"w2_a", "w2_b", "t2"})),
    "oft": (({"blocks"}, {"diag", "R"}), ({"diag"}, {"R"})),
}
#: tensor that stands beside another method's own -> the methods that it may stand beside
_BESIDE: dict[str, set[str]] = {
    "magnitude": {"dora", "locon", "loha", "lokr"},
    "diff_b": {"biased", "dora", "locon", "loha", "lokr", "full"},
    "up_bias": {"biased", "bottleneck"},
}
#: method -> (tensor, axis) whose length is the rank, the first that is there
_RANK: dict[str, tuple[tuple[str, int], ...]] = {
    "lora": (("down", 0),),
    "biased": (("down", 0),),
    "dora": (("down", 0),),
    "locon": (("down", 0),),
    "loha": (("w1_b", 0),),
    "lokr": (("w2_b", 0), ("w1_b", 0)),
    "glora": (("a2", 0),),
    "bottleneck": (("down", 0),),
    "tlora": (("down", 0),),
}
#: norms whose whole weight Diffusers keeps beside a Control LoRA, under its plain name
_WHOLE_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_WHOLE_NUMBERS = ("on_input", "shape", "projection", "scaled")


@dataclass
class _Group:
    """The tensors of one layer, as they come."""

    layer: str
    parts: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # part -> (key, tensor)
    methods: set[str] = field(default_factory=set)


def assemble(tensors: Mapping[str, Tensor], alpha_of: AlphaOf = lambda *_: None) -> Parsed:
    """The neutral form of `tensors`. What is not a whole layer goes to `unused`, with the reason."""
    parsed = Parsed(layers={})
    parsed.embeddings, tensors = take_embeddings(tensors, parsed.unused)
    groups = _grouped(tensors, parsed)
    for (component, _), group in groups.items():
        layer = _layer(component, group, alpha_of, parsed)
        if layer:
            parsed.layers.setdefault(component, {})[group.layer] = layer
    return parsed


def _grouped(tensors: Mapping[str, Tensor], parsed: Parsed) -> dict[tuple[str, str], _Group]:
    names = {key: split(key) for key in tensors}
    components = _components([name for name in names.values() if name])
    groups: dict[tuple[str, str], _Group] = {}
    for key, name in names.items():
        if name is None:
            what = refused(key)
            parsed.unused[key] = f"it belongs to {what}" if what else "no adapter tensor is spelled like that"
            continue
        component, layer, method, part = name
        component = components.get(component, component)
        group = groups.get(place := (component, same_layer(layer)))
        if group is None:
            group = groups[place] = _Group(layer)
        if part in group.parts:
            parsed.unused[key] = f"it says the same as {group.parts[part][0]!r}"
            continue
        if "." in layer:
            group.layer = layer  # where both spellings occur, the one that can be read back
        group.parts[part] = (key, tensors[key])
        if method != "*":
            group.methods.add(method)
    return groups


def _components(names: list[Key]) -> dict[str, str]:
    """What the components that a prefix leaves open are in this file."""
    said = {name.component for name in names}
    known = said & {"unet", "transformer"}
    denoiser = [name.layer for name in names if name.component in (DENOISER, "transformer")]
    found = {DENOISER: known.pop() if len(known) == 1 else denoiser_of(denoiser)}
    encoders = said & {"text_encoder", "text_encoder_2", "text_encoder_3"}
    both = encoders == {"text_encoder", "text_encoder_3"} and not denoiser
    if both or ("text_encoder_3" in said and "text_encoder_2" not in said and is_flux(denoiser)):
        found["text_encoder_3"] = "text_encoder_2"  # kohya counts T5 third; FLUX has no CLIP-G before it
    return found


def _layer(component: str, group: _Group, alpha_of: AlphaOf, parsed: Parsed) -> LayerAdapter | None:
    parts = dict(group.parts)
    alpha = parts.pop("alpha", None)
    if group.methods == {"ia3"} and parts.keys() == {"weight"} and group.layer.endswith(_WHOLE_NORMS):
        group.methods, parts = {"set"}, {"value": parts["weight"]}
    method = _method(group.methods, parts)
    if {"dora_scale", "magnitude"} <= parts.keys():
        parsed.unused[parts["magnitude"][0]] = f"it says the same as {parts['dora_scale'][0]!r}"
    tensors = _plain_if_alone(_with_magnitude({part: tensor for part, (_, tensor) in parts.items()}))
    problem = _problem(group.methods, method, tensors)
    if problem:
        for key, _ in group.parts.values():
            parsed.unused[key] = problem
        return None
    rank = rank_of(method, tensors)
    if rank is None:  # the alpha of OFT is a constraint, that of a LoKr in full means nothing: kept, never a scale
        return LayerAdapter(method, tensors, *_stored(alpha, parsed))
    try:
        said = alpha_of(component, group.layer, rank)
    except AdapterFileError as error:
        said = None
        parsed.unused[next(iter(parts.values()))[0]] = str(error)
    return LayerAdapter(method, tensors, *_alpha(alpha, rank, said, parsed))


def _with_magnitude(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A magnitude for each output as (out,), one for each input as LyCORIS stores it, (1, in[, 1, 1]).

    PEFT knows the first kind alone; LyCORIS writes (out, 1[, 1, 1]) or the second.
    """
    scale = tensors.pop("dora_scale", None)
    if scale is not None:
        by_input = scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() > 1
        tensors["magnitude"] = scale if by_input else scale.reshape(-1)
    elif "magnitude" in tensors:
        tensors["magnitude"] = tensors["magnitude"].reshape(-1)
    return tensors


def _plain_if_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A list of one block tensor, which sd-scripts writes for FLUX's layers that it does not split, as the tensor."""
    if "blocks.0" in tensors and not {"blocks", "blocks.1", "blocks.2", "blocks.3"} & tensors.keys():
        tensors["blocks"] = tensors.pop("blocks.0")
    return tensors


def _method(methods: set[str], parts: Mapping[str, object]) -> str:
    if methods == {"lora", "locon"}:
        return "locon"
    if methods == {"lora"} and ("magnitude" in parts or "dora_scale" in parts):
        return "dora"
    if methods == {"lora"} and {"diff_b", "up_bias"} & parts.keys():
        return "biased"
    if not methods:
        return "full"
    return min(methods)


def _problem(methods: set[str], method: str, tensors: Mapping[str, Tensor]) -> str | None:
    if len(methods - {"lora"} if method == "locon" else methods) > 1:
        return f"tensors of {' and '.join(sorted(methods))} on one layer"
    if method == "oft" and (problem := _broken_list(tensors)):
        return problem
    if said_twice := next(
        (pair for pair in _EITHER.get(method, ()) if all(tensors.keys() & part for part in pair)), None
    ):
        one, other = (", ".join(sorted(tensors.keys() & part)) for part in said_twice)
        return f"{method} has {one} and {other} here, of which one would do nothing"
    if foreign := sorted(part for part in tensors.keys() & _BESIDE.keys() if method not in _BESIDE[part]):
        return f"{method} takes no {' and no '.join(foreign)} beside it"
    missing = min([whole - tensors.keys() for whole in _WHOLE[method]], key=len)
    if method == "ia3" and "on_input" in missing:
        return "a plain weight is no adapter's tensor"
    if missing:
        return f"{method} needs {', '.join(sorted(missing))} beside it, which is not in the file"
    empty = [part for part, tensor in tensors.items() if not tensor.numel()]
    if empty:
        return f"{', '.join(sorted(empty))} has no elements"
    whole = [part for part, tensor in tensors.items() if not (tensor.is_floating_point() or part in _WHOLE_NUMBERS)]
    if whole:
        kind = str(tensors[min(whole)].dtype).removeprefix("torch.")
        return f"{min(whole)} holds {kind}, expected floating-point numbers"
    return _unlike_ranks(tensors) if "down" in tensors else None


def _broken_list(tensors: Mapping[str, Tensor]) -> str | None:
    found = sorted(tensors)
    if not any(part.startswith("blocks.") for part in found) or found == [f"blocks.{i}" for i in range(len(found))]:
        return None
    return f"oft in parts needs blocks.0, blocks.1 and so on and nothing else; this has {', '.join(found)}"


def _unlike_ranks(tensors: Mapping[str, Tensor]) -> str | None:
    down, up = tensors["down"], tensors["up"]
    if down.ndim >= 2 and up.ndim >= 2 and up.shape[1] == down.shape[0]:
        return None
    return f"down {tuple(down.shape)} and up {tuple(up.shape)} are no pair: expected (rank, in) and (out, rank)"


def rank_of(method: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank that a layer's tensors show; None where the method has none."""
    for part, axis in _RANK.get(method, ()):
        if part in tensors and tensors[part].ndim > axis:
            return tensors[part].shape[axis]
    return None


def _stored(alpha: tuple[str, Tensor] | None, parsed: Parsed) -> tuple[float | None, AlphaSource]:
    value = _value(alpha, parsed) if alpha else None
    return value, "none" if value is None else "tensor"


def _alpha(
    alpha: tuple[str, Tensor] | None, rank: int, said: float | None, parsed: Parsed
) -> tuple[float, AlphaSource]:
    value = _value(alpha, parsed) if alpha else None
    if alpha and value is not None:
        if said is not None and not math.isclose(value, said, rel_tol=5e-3):  # an alpha stored in bfloat16
            parsed.unused[alpha[0]] = f"it is {value:g}, while the metadata gives this layer alpha {said:g}"
        return value, "tensor"
    if said is not None:
        return said, "metadata"
    return float(rank), "assumed"


def _value(alpha: tuple[str, Tensor], parsed: Parsed) -> float | None:
    key, tensor = alpha
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(value):
        parsed.unused[key] = f"an alpha must be one finite number, this is {tensor.flatten()[:3].tolist()}"
        return None
    return value
