"""TrainConfig: everything a training run can be told, from one TOML file.

    name = "ink"
    base = "samples/base"            # Diffusers folder or hub id
    output = "runs/ink"              # checkpoints, adapter, report

    recipe = "style"                 # or "character"; or none

    [data]
    folder = "samples/packs/ink"

An unknown setting is an error that names the nearest known one. `train.steps=10` on the command line
overrides `steps` under `[train]`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from lora_diffusion.errors import ConfigError, did_you_mean
from lora_diffusion.training.recipes import NEEDS_TRIGGER, with_recipe
from lora_diffusion.training.sections import (
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    LoopConfig,
    LossConfig,
    PriorConfig,
    Section,
    TextConfig,
    TimesConfig,
    WatchConfig,
)


class TrainConfig(Section):
    """One training run."""

    name: str = Field(pattern=r"^[^/\\\x00-\x1f]+$")
    base: str
    output: Path
    recipe: Literal["style", "character"] | None = None
    """Other defaults, as `recipes.py` has them."""
    data: DataConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig.model_construct)
    backbone: BackboneConfig = Field(default_factory=BackboneConfig.model_construct)
    loss: LossConfig = Field(default_factory=LossConfig.model_construct)
    times: TimesConfig = Field(default_factory=TimesConfig.model_construct)
    prior: PriorConfig = Field(default_factory=PriorConfig.model_construct)
    text: TextConfig = Field(default_factory=TextConfig.model_construct)
    watch: WatchConfig = Field(default_factory=WatchConfig.model_construct)
    train: LoopConfig = Field(default_factory=LoopConfig.model_construct)

    @model_validator(mode="before")
    @classmethod
    def _over_the_recipe(cls, given: Any) -> Any:
        return with_recipe(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.recipe in NEEDS_TRIGGER and not self.data.trigger:
            raise ValueError(f"recipe {self.recipe!r} needs data.trigger, the word that calls what is learned")
        if fault := _fault_of(self.prior, self.data):
            raise ValueError(fault)
        if self.adapter.targets == [] and not self.text.live:
            raise ValueError("adapter.targets is empty, and neither text.tokens nor text.train is there to be trained")
        if fault := _fault_of_rates(self.train, self.text):
            raise ValueError(fault)
        if self.watch.every and not self.watch.prompts:
            raise ValueError("watch.every draws watch.prompts, and there are none")
        return self

    @classmethod
    def load(cls, path: str | Path, assignments: Iterable[str] = ()) -> TrainConfig:
        """Read a TOML file. `assignments` are `key=value` with dotted keys; paths are taken from where you are."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"no configuration file {path}")
        try:
            settings = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
        for assignment in assignments:
            override(settings, assignment)
        return cls.parse(settings, str(path))

    @classmethod
    def parse(cls, settings: Mapping[str, Any], source: str = "settings") -> TrainConfig:
        """From nested dictionaries. ConfigError names the setting, what was found and what was expected."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain(error)}") from None

    def changed(self, *assignments: str) -> TrainConfig:
        """A copy with `key=value` assignments applied."""
        settings = self.model_dump(mode="json")
        for assignment in assignments:
            override(settings, assignment)
        return self.parse(settings)


def _fault_of(prior: PriorConfig, data: DataConfig) -> str | None:
    """What a prior lacks to work with."""
    if prior.kind == "teacher" and not (data.trigger and prior.subject):
        return (
            "prior.kind = 'teacher' needs data.trigger, the new word, and prior.subject, what it is one of (such as"
            " 'person'), to say in its place"
        )
    if prior.kind == "pictures" and not (prior.subject or prior.folder):
        return "prior.kind = 'pictures' needs prior.folder, or prior.subject for the base to draw"
    if prior.kind == "none" and (prior.subject or prior.folder):
        return "prior.subject and prior.folder do nothing while prior.kind is 'none'"
    return None


def _fault_of_rates(loop: LoopConfig, text: TextConfig) -> str | None:
    """What an optimiser that has its own way with rates cannot be told."""
    if loop.optimizer == "prodigy":
        others = {"train.up_ratio": loop.up_ratio * loop.lr}
        others |= {"text.lr": text.lr} if text.train else {}
        others |= {"text.token_lr": text.token_lr} if text.tokens else {}
        if wrong := [name for name, rate in others.items() if rate != loop.lr]:
            equal = "1" if wrong[0] == "train.up_ratio" else f"{loop.lr:g}, as train.lr is"
            return f"train.optimizer = 'prodigy' finds one rate for everything; set {wrong[0]} to {equal}"
    if loop.optimizer == "schedule-free":
        if loop.schedule != "constant":
            return "train.optimizer = 'schedule-free' is instead of train.schedule; set that to 'constant'"
        if loop.ema is not None:
            return "train.optimizer = 'schedule-free' saves an average of its own; leave train.ema out"
    return None


def default_settings() -> dict[str, Any]:
    """Every setting that has a default, as a checkpoint holds it (of the backbone it holds the bytes' hash alone)."""
    return TrainConfig.parse({"name": "x", "base": "", "output": "", "data": {"folder": ""}}).model_dump(
        mode="json", exclude={"name": True, "base": True, "output": True, "backbone": True, "data": {"folder"}}
    )


def override(settings: dict[str, Any], assignment: str) -> None:
    """Apply `section.key=value` (TOML value or bare word) to nested settings. ConfigError for anything else."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"{assignment!r} is no setting; expected key=value such as train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # bare words are strings
    *sections, last = key.split(".")
    inner: Any = settings
    for section in sections:
        inner = inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{assignment!r}: {section!r} is a setting, not a section")
    inner[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # one of our own
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown setting {where!r}{did_you_mean(where, _known_settings())}"
    if first["type"] == "missing":
        return f"setting {where!r} is missing"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _known_settings() -> list[str]:
    known: list[str] = []
    for name, field in TrainConfig.model_fields.items():
        section = field.annotation
        inner = section.model_fields if isinstance(section, type) and issubclass(section, Section) else None
        known += [name, *(f"{name}.{key}" for key in inner or ())]
    return known
