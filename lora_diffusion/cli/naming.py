"""What layers are called: as the spelling asks that is written, and alike before adapters are merged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from lora_diffusion.adapter import Adapter, same_layer
from lora_diffusion.errors import AdapterMismatchError, TargetError, some
from lora_diffusion.families.names import is_of_checkpoint, side_of
from lora_diffusion.families.original import dotted, named_for, with_encoders
from lora_diffusion.families.skeletons import PUBLISHED, skeleton, skeleton_of
from lora_diffusion.formats.identity import UNKNOWN
from lora_diffusion.formats.provenance import family_for

#: spellings whose layers Diffusers' models name
_IN_DIFFUSERS_NAMES = ("diffusers", "peft")
#: family -> those layers (flattened) that its checkpoint calls as Diffusers does
_SAME_NAMES = {
    "Qwen-Image": re.compile(r".*"),
    "LTX": re.compile(r"transformer_blocks_\d+_\w*(attn|ff)\w*_(to_[qkv]|to_out_0|net_0_proj|net_2)"),
}
#: families that cannot be told apart -> one that has all their layers' names
_NAMED_LIKE = {"Stable Diffusion 1.x or 2.x": "Stable Diffusion 2.x"}


def named_as(adapter: Adapter, to: str, base: str | None) -> Adapter:
    """The adapter under the names that `to` asks for, as far as its family or `base`, a pipeline folder, has them.

    TargetError for the checkpoint's names where none gives Diffusers' and `to` has those alone.
    """
    guessed = family_for(adapter).name
    family = _NAMED_LIKE.get(guessed, guessed)
    if not len(adapter) or (base is None and family not in PUBLISHED):
        return _under_its_own_names(adapter, to)
    models = skeleton(family) if base is None else skeleton_of(base)
    try:
        return named_for(adapter, to, models)
    except AdapterMismatchError:
        if base is None and family != guessed:  # neither of them: its own names will do, if `to` can say them
            return _under_its_own_names(adapter, to)
        raise


def named_alike(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters of one family known by heart, under Diffusers' names where only some of them have those.

    Else one layer would stand twice in their merge. Adapters of other families and of more than one are left as they
    are; TargetError where some of those have Diffusers' names and some the checkpoint's.
    """
    families = {family_for(adapter).name for adapter in adapters if len(adapter)} - {UNKNOWN.name}
    known = {_NAMED_LIKE.get(family, family) for family in families}
    if len(known) > 1:
        known -= {_NAMED_LIKE[family] for family in families & _NAMED_LIKE.keys()}
    if len(adapters) < 2 or len(known) != 1 or not known <= PUBLISHED.keys():
        return _of_one_side(adapters)
    models = skeleton(known.pop())
    if len({_has_live_names(adapter, models) for adapter in adapters if len(adapter)}) == 1:
        return list(adapters)
    try:
        return [dotted(adapter, models) for adapter in adapters]
    except AdapterMismatchError:  # one of them is of another family after all
        return _of_one_side(adapters)


def _of_one_side(adapters: Sequence[Adapter]) -> list[Adapter]:
    sides = {side_of(name): (adapter.name, name) for adapter in adapters for _, name, _ in adapter}
    if {"checkpoint", "diffusers"} <= sides.keys():
        (one, ours), (other, theirs) = sides["checkpoint"], sides["diffusers"]
        raise TargetError(
            f"merge: {ours!r} of {one!r} is the checkpoint's name of a layer, {theirs!r} of {other!r} Diffusers'; "
            "one layer could stand in the merge twice: name a pipeline folder (--base)"
        )
    return list(adapters)


def _has_live_names(adapter: Adapter, models: Mapping[str, nn.Module]) -> bool:
    live = {c: {same_layer(name) for name, _ in model.named_modules()} for c, model in models.items()}
    return all(same_layer(name) in live.get(component, ()) for component, name, _ in adapter)


def _under_its_own_names(adapter: Adapter, to: str) -> Adapter:
    foreign = to in _IN_DIFFUSERS_NAMES and adapter.spelling != to
    if found := [name for _, name, _ in adapter if foreign and is_of_checkpoint(name)]:
        raise TargetError(
            f"{to}: {some(found)} are layer names of the checkpoint, which Diffusers' model calls otherwise; "
            "name a pipeline folder (--base)"
        )
    own = adapter.spelling not in _IN_DIFFUSERS_NAMES or to in _IN_DIFFUSERS_NAMES
    same = _SAME_NAMES.get(family_for(adapter).name)
    if found := [name for component, name, _ in adapter if not own and _would_be_ignored(component, name, to, same)]:
        raise TargetError(
            f"{to}: {some(found)} are layer names of Diffusers' model; tools that read {to} files know the checkpoint's"
            " names and would leave them out: name a pipeline folder (--base)"
        )
    return with_encoders(adapter, to)


def _would_be_ignored(component: str, name: str, to: str, same: re.Pattern[str] | None) -> bool:
    """Whether a layer's name is Diffusers' alone; of U-Nets, ComfyUI's generic files have none of those.

    `same`: names of the denoiser's layers that are the checkpoint's too, all of them, where the family is known.
    """
    if same is not None and component == "transformer":
        return not same.fullmatch(name.replace(".", "_"))
    in_unet = to == "comfy" and name.startswith(("down_blocks.", "up_blocks.", "mid_block."))
    return in_unet or side_of(name) == "diffusers"
