"""TrainConfig: everything a training run can be told, from one TOML file.

    name = "ink"
    base = "samples/base"            # Diffusers folder or hub id
    output = "runs/ink"              # checkpoints, adapter, report

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

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_diffusion.errors import ConfigError, did_you_mean
from lora_diffusion.quantize import Precision


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Pictures and captions."""

    folder: Path
    """Pictures with captions beside them (`NAME.txt`, `metadata.jsonl`, …)."""
    heldout: Path | float = 0.1
    """A folder of pictures that are never trained on, or the share of `folder` to hold out (0 to 0.5)."""
    resolution: int = Field(512, ge=16, multiple_of=8)
    """Pixels; pictures are brought to buckets of about this area."""
    upscale: bool = False
    """Enlarge pictures that are smaller than their bucket; otherwise they get a bucket of their own size."""
    trigger: str = ""
    """Put in front of every caption."""
    caption_dropout: float = Field(0.05, ge=0, le=1)
    """Probability of training a picture without caption (keeps classifier-free guidance working)."""
    flip: bool = False
    """Mirror half of the pictures."""
    skip_bad: bool = False
    """Go on without pictures that cannot be read, instead of listing them and stopping."""


class AdapterConfig(_Section):
    """What is trained."""

    method: str = "lora"
    """What `lora-diffusion methods` lists."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What that method has besides the settings below, such as {factor = 8} of LoKr."""
    rank: int = Field(16, ge=1)
    """Of methods that have one; OFT's largest block."""
    alpha: float | None = None
    """None: the rank, so that the scale is 1. (OFT: the bound of the rotation, None is none.)"""
    rslora: bool = False
    """rsLoRA: the scale is alpha / √rank instead of alpha / rank (arXiv 2312.03732)."""
    targets: str | list[str] = "attention"
    """Preset ("attention", "attention-qv", "attention+ff", "all-linear", "…+conv", "norm"), glob, or a list."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the rank axis, row by row at every token."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """The same for a whole picture at a time."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of leaving a layer's adapter out of a step."""
    nested: bool = False
    """DyLoRA (arXiv 2210.07558): the first b rows are trained to be an adapter of rank b, for every b."""
    init: Literal["pissa", "olora", "loftq", "eva", "gaussian", "kaiming"] | None = None
    """How a LoRA starts; None: "kaiming", and for other methods their own."""
    freeze_down: bool = False
    """LoRA-FA (arXiv 2308.03303): only `up` is trained, which saves activations."""
    ranks: dict[str, int] = Field(default_factory=dict)
    """Ranks of layers by glob, such as {"mid_block.*" = 32}; the last that matches counts."""
    alphas: dict[str, float] = Field(default_factory=dict)
    """Alphas by glob."""
    max_norm: float | None = Field(None, gt=0)
    """Frobenius norm that the delta of a layer's pair may have; longer ones are scaled down after each step."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    format: str | None = None
    """None: diffusers where it can say the method (LoRA, DoRA), else kohya."""


class BackboneConfig(_Section):
    """The frozen model underneath."""

    precision: Precision = "nf4"
    """Linear layers of the denoiser; what stays in 16 bits is listed when training starts."""
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class LossConfig(_Section):
    """What is minimised. Held-out losses are mean squared errors whatever is set here."""

    kind: Literal["mse", "huber", "smooth_l1"] = "mse"
    """huber and smooth_l1 grow linearly beyond `delta`, so that odd pictures pull less."""
    delta: float = Field(0.1, gt=0)
    """Error from which huber and smooth_l1 are linear; latents have about unit variance."""
    snr_gamma: float | None = Field(None, gt=0)
    """min-SNR weighting (arXiv 2303.09556), such as 5, for epsilon and v; None: every timestep counts the same."""


class TimesConfig(_Section):
    """Which noise levels a flow is trained at (SD3, FLUX, …); bases with timesteps draw them uniformly."""

    sampling: Literal["uniform", "logit-normal"] | None = None
    """None: logit-normal for flows (arXiv 2403.03206), uniform for timesteps."""
    mean: float = 0.0
    """Of the logit; below 0 is more detail, above 0 more composition."""
    std: float = Field(1.0, gt=0)
    """Of the logit."""
    shift: float | None = Field(None, gt=0)
    """Above 1 moves times to the noisy end; None: the base's own shift."""


class LoopConfig(_Section):
    """How long and how fast."""

    steps: int = Field(800, ge=1)
    batch: int = Field(4, ge=1)
    accumulate: int = Field(1, ge=1)
    """Batches added up for one optimiser step."""
    lr: float = Field(1e-4, gt=0)
    up_ratio: float = Field(1.0, gt=0)
    """LoRA+ (arXiv 2402.12354): the learning rate of `up` over that of `down`, such as 16."""
    warmup: int = Field(20, ge=0)
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the adapter, such as 0.99, that is saved as `ema_saved` says; None: no average."""
    ema_saved: Literal["instead", "beside"] = "instead"
    """The average as NAME.safetensors, or as NAME-ema.safetensors beside the last step's."""
    checkpointing: bool = False
    """Forget activations and compute them again in backward: a quarter to a third slower, far less memory."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints; Ctrl-C writes one as well."""
    seed: int = 0


class TrainConfig(_Section):
    """One training run."""

    name: str = Field(pattern=r"^[^/\\\x00-\x1f]+$")
    base: str
    output: Path
    data: DataConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig.model_construct)
    backbone: BackboneConfig = Field(default_factory=BackboneConfig.model_construct)
    loss: LossConfig = Field(default_factory=LossConfig.model_construct)
    times: TimesConfig = Field(default_factory=TimesConfig.model_construct)
    train: LoopConfig = Field(default_factory=LoopConfig.model_construct)

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
    if first["type"] == "extra_forbidden":
        return f"unknown setting {where!r}{did_you_mean(where, _known_settings())}"
    if first["type"] == "missing":
        return f"setting {where!r} is missing"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _known_settings() -> list[str]:
    known: list[str] = []
    for name, field in TrainConfig.model_fields.items():
        section = field.annotation
        inner = section.model_fields if isinstance(section, type) and issubclass(section, _Section) else None
        known += [f"{name}.{key}" for key in inner] if inner else [name]
    return known
