"""A PEFT `LoraConfig` as a file carries it: rank and alpha per layer, read and written.

    alpha of a layer = alpha_pattern[key] of the first key that matches its name, else lora_alpha
    scale            = alpha / rank, with `use_rslora` alpha / sqrt(rank)

A key matches as `(.*\\.)?(key)$` from the start of the name (peft.utils.other.get_pattern_key), that is as a regular
expression. Those that come in a file are not trusted: a literal one is looked up, another is matched only if
it is short and cannot run away, and all of them together for a few seconds.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

from lora_diffusion.adapter import LayerAdapter
from lora_diffusion.errors import AdapterFileError
from lora_diffusion.formats import Parsed

#: where Diffusers (0.34 and later) keeps the LoraConfig of every component, as one flat JSON table
METADATA_KEY = "lora_adapter_metadata"

#: where `load_adapter` puts the text of a PEFT folder's `adapter_config.json`
SIDECAR_KEY = "adapter_config.json"

_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\W)+\$?", re.ASCII)
_ESCAPED = re.compile(r"\\(\W)", re.ASCII)
_TAME = re.compile(r"[\w.\\|^$*+\[\]()?:-]{1,400}")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_CHOICE = re.compile(r"[*+]\??|(?<!\()\?|\(")  # where a match can go more than one way
_REPEATS, _CHOICES = 3, 4  # of one pattern: matching takes at worst that power of the name's length
_LONGEST = 200  # characters of a name that patterns are matched with; the longest of a known model has 120
_LARGEST = 1e300  # of any number: whole numbers of JSON have no end, and NaN is not below it
_PATIENCE = 5.0  # seconds for all patterns on all layers; thousands of layers with usual patterns need 0.1
#: starts that PEFT makes by changing the base weights too: what the file holds goes with a base nobody else has
_MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Scales:
    """Rank and alpha that one component's LoraConfig gives its layers."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MOVED_BASE):
            raise AdapterFileError(
                f"{where}: init_lora_weights is {start[:40]!r}, trained beside a base whose weights PEFT had changed; "
                "PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) makes a plain LoRA of it"
            )
        self._rank = _number(config.get("r", 8), "r", where)
        self._alpha = _number(config.get("lora_alpha", 8), "lora_alpha", where)
        self._ranks = _Pattern(config.get("rank_pattern"), f"{where}: rank_pattern")
        self._alphas = _Pattern(config.get("alpha_pattern"), f"{where}: alpha_pattern")
        self._rslora = bool(config.get("use_rslora"))
        self.dora = bool(config.get("use_dora"))

    def alpha(self, layer: str, rank: int) -> float:
        """Alpha of `layer`, rsLoRA folded in, so that alpha / rank is its scale.

        AdapterFileError if the config gives the layer another rank than its tensors have.
        """
        expected = self._ranks.get(layer, self._rank)
        if expected != rank:
            raise AdapterFileError(
                f"{self._where}: layer {layer!r} has rank {rank}, the metadata says {expected:g}; its scale is unsure"
            )
        alpha = self._alphas.get(layer, self._alpha)
        return alpha * math.sqrt(rank) if self._rslora else alpha


def without_magnitudes(parsed: Parsed, components: Iterable[str]) -> Parsed:
    """`parsed` with the plain pairs of components whose config says `use_dora` set aside: they are half a DoRA."""
    for component in components:
        layers = parsed.layers.get(component, {})
        plain = [name for name, layer in layers.items() if layer.method == "lora"]
        why = "the metadata say use_dora, and its lora_magnitude_vector is not in the file"
        parsed.unused |= {f"{component}.{name}": why for name in plain}
        parsed.layers[component] = {name: layer for name, layer in layers.items() if name not in plain}
    return parsed


class OneScale:
    """AdaLoRA's: lora_alpha / (init_r + 1e-5) for every layer, whatever rank is left of it."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        alpha, rank = _number(config.get("lora_alpha", 8), "lora_alpha", where), config.get("init_r", 12)
        if alpha <= 0 or _number(rank, "init_r", where) < 1:
            raise AdapterFileError(f"{where}: lora_alpha {alpha:g} and init_r {rank}; expected both above 0")
        self._scale = alpha / (rank + 1e-5)

    def alpha(self, layer: str, rank: int) -> float:
        """Alpha of a layer of that rank, so that alpha / rank is the scale."""
        return self._scale * rank


#: settings of PEFT's OFT -> what they are where nothing else is known, as in a single file: the defaults
_TURNS = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False}


class NoScale:
    """OFT's. AdapterFileError for turns that are made of their numbers in another way than by default."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        for setting, usual in _TURNS.items():
            if (found := config.get(setting, usual)) != usual:
                raise AdapterFileError(
                    f"{where}: {setting} is {str(found)[:40]}; OFT of PEFT is read with {setting} {usual} alone"
                )

    def alpha(self, layer: str, rank: int) -> float:
        """AdapterFileError: what has a rank is no OFT."""
        raise AdapterFileError(f"{self._where}: peft_type is 'OFT', but layer {layer!r} has tensors of rank {rank}")


class _Pattern:
    """Pattern -> number, as PEFT looks it up, in time linear in the number of layers."""

    def __init__(self, table: object, where: str) -> None:
        self._literal: dict[tuple[str, bool], tuple[int, float]] = {}  # (name, anchored at the start) -> (order, value)
        self._others: list[tuple[int, re.Pattern[str], float]] = []
        self._where, self._spent = where, 0.0
        if table is not None and not isinstance(table, dict):
            raise AdapterFileError(f"{where} is not a table of layer names and numbers")
        for order, (key, value) in enumerate(cast("dict[str, object]", table or {}).items()):
            number = _number(value, key, where)
            if _LITERAL.fullmatch(key):
                name = _ESCAPED.sub(r"\1", key.removeprefix("^").removesuffix("$"))
                self._literal.setdefault((name, key.startswith("^")), (order, number))
            else:
                self._others.append((order, _expression(key, where), number))

    def get(self, layer: str, default: float) -> float:
        """The number of the first key that matches `layer`."""
        words = layer.split(".")
        endings = [(".".join(words[start:]), False) for start in range(len(words))]
        hits = [self._literal[key] for key in [(layer, True), *endings] if key in self._literal]
        hits += self._matched(layer) if self._others else []
        return min(hits)[1] if hits else default

    def _matched(self, layer: str) -> list[tuple[int, float]]:
        if len(layer) > _LONGEST:
            raise AdapterFileError(
                f"{self._where}: a layer name of {len(layer):,} characters; {_LONGEST} can be matched"
            )
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", layer))]
        found: list[tuple[int, float]] = []
        for order, expression, value in self._others:
            begun = time.perf_counter()
            if any(expression.fullmatch(layer, start) for start in starts):  # `^` is the name's start at any of them
                found.append((order, value))
            self._spent += time.perf_counter() - begun
            if self._spent > _PATIENCE:
                raise AdapterFileError(f"{self._where}: its patterns take more than {_PATIENCE:g} s to match")
        return found


def scales_of(metadata: Mapping[str, str]) -> dict[str, Scales]:
    """component -> scales from `lora_adapter_metadata`; empty where the file has none."""
    if METADATA_KEY not in metadata:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _json(metadata[METADATA_KEY], f"metadata {METADATA_KEY!r}").items():
        component, _, setting = key.partition(".")
        configs.setdefault(component, {})[setting] = value
    return {component: Scales(config, f"{METADATA_KEY} {component}") for component, config in configs.items()}


def sidecar_scales(metadata: Mapping[str, str]) -> Scales | OneScale | NoScale | None:
    """Scales from the `adapter_config.json` of a PEFT folder, of one component; None without one, and of VeRA."""
    if SIDECAR_KEY not in metadata:
        return None
    config = _json(metadata[SIDECAR_KEY], "adapter_config.json")
    kind = config.get("peft_type", "LORA")
    if kind == "VERA":
        return None
    if kind == "OFT":
        return NoScale(config, "adapter_config.json")
    if kind == "ADALORA":
        return OneScale(config, "adapter_config.json")
    if kind != "LORA":
        expected = "expected 'LORA', 'ADALORA', 'OFT' or 'VERA'"
        raise AdapterFileError(f"adapter_config.json: peft_type is {str(kind)[:40]!r}, {expected}")
    return Scales(config, "adapter_config.json")


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where} is damaged JSON ({str(error)[:100]})") from None
    if not isinstance(table, dict):
        raise AdapterFileError(f"{where} is not a JSON object")
    return cast("dict[str, Any]", table)


def config_of(layers: Mapping[str, LayerAdapter], suffix_keys: bool = False) -> dict[str, Any]:
    """The LoraConfig settings under which Diffusers and PEFT give every layer its own rank and alpha.

    The commonest rank and alpha stand for all; the others are named. Keys are anchored at the start unless
    `suffix_keys`, which is for text encoders, whose live names have a `text_model.` level or not.
    """
    ranks = {name: layer.tensors["down"].shape[0] for name, layer in layers.items()}
    alphas = {name: ranks[name] if layer.alpha is None else layer.alpha for name, layer in layers.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())

    def key(name: str) -> str:
        return re.escape(name) if suffix_keys else f"^{re.escape(name)}"

    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {key(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {key(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(layers),
        "use_dora": any(layer.method == "dora" for layer in layers.values()),
    }


def _commonest(values: Iterable[float]) -> float:
    value = Counter(values).most_common(1)[0][0]
    return int(value) if value == int(value) else value


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise AdapterFileError(f"{where}: {key[:100]!r} is {str(value)[:40]!r}, expected a finite number")
    return float(value)


def _expression(key: str, where: str) -> re.Pattern[str]:
    choices = _CHOICE.findall(key)
    runs_away = len(choices) > _CHOICES or len(choices) - choices.count("(") > _REPEATS
    if not _TAME.fullmatch(key) or _REPEATED_GROUP.search(key) or runs_away:
        raise AdapterFileError(f"{where}: the key {key[:60]!r} is not a layer name, and no pattern that is safe to run")
    try:
        return re.compile(key)
    except re.error as error:
        raise AdapterFileError(f"{where}: the key {key[:60]!r} is not a valid pattern ({error})") from None
