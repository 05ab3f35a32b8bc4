"""Every setting of a training run with its meaning and limits; `config.py` reads them from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lora_diffusion.quantize import Precision


class Section(BaseModel):
    """Frozen, and an unknown setting is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FolderConfig(Section):
    """One more folder of pictures."""

    folder: Path
    weight: float = Field(1.0, gt=0)
    """How often its pictures are seen, over those of `data.folder`."""
    repeats: int = Field(1, ge=1)


class DataConfig(Section):
    """Pictures and captions."""

    folder: Path
    """Pictures with captions beside them (`NAME.txt`, `metadata.jsonl`, …)."""
    heldout: Path | float = 0.1
    """A folder of pictures that are never trained on, or the share of `folder` to hold out (0 to 0.5)."""

    @field_validator("heldout")
    @classmethod
    def _is_a_share(cls, value: Path | float) -> Path | float:
        if not isinstance(value, Path) and not 0 <= value <= 0.5:
            raise ValueError(f"data.heldout is {value}; expected a folder, or a share from 0 to 0.5")
        return value

    resolution: int = Field(512, ge=16, multiple_of=8)
    """Pixels; pictures are brought to buckets of about this area."""
    upscale: bool = False
    """Enlarge pictures that are smaller than their bucket; otherwise they get a bucket of their own size."""
    trigger: str = ""
    """Put in front of every caption."""
    caption_dropout: float = Field(0.05, ge=0, le=1)
    """Probability of training a picture without caption (keeps classifier-free guidance working)."""
    folders: list[FolderConfig] = Field(default_factory=list)
    """Further folders, each with a weight and repeats: `[[data.folders]]`."""
    resolutions: list[int] = Field(default_factory=list)
    """Further resolutions: every picture is trained at each."""
    max_aspect: float = Field(2.0, ge=1)
    """Longest side over shortest of a bucket."""
    crop: Literal["centre", "random"] = "centre"
    """Where a picture is cut that is longer than its bucket."""
    crops: int = Field(1, ge=1)
    """Cuts of each picture, where they are random."""
    caption_from: Literal["files", "filename"] = "files"
    """Caption files and metadata, or the name of the picture."""
    fallback_caption: str | None = None
    """For pictures without a caption, which are an error otherwise."""
    shuffle: bool = False
    """Tags between commas come in `caption_variants` different orders."""
    keep_tokens: int = Field(0, ge=0)
    """So many tags stay in front when shuffled."""
    caption_variants: int = Field(4, ge=1)
    """Orders that are encoded and cached of each caption."""
    flip: bool = False
    """Mirror half of the pictures."""
    background: str = "white"
    """What shows through where a picture is transparent: a name, or "#rrggbb"."""

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        try:
            ImageColor.getcolor(value, "RGB")
        except ValueError:
            raise ValueError(f'data.background is {value!r}; expected a colour such as "white" or "#808080"') from None
        return value

    skip_bad: bool = False
    """Go on without pictures that cannot be read, instead of listing them and stopping."""


class AdapterConfig(Section):
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
    """Preset ("attention", "attention-qv", "attention+ff", "all-linear", "…+conv", "norm"), glob, or a list.

    []: no layer of the denoiser, with `text.tokens` (textual inversion, arXiv 2208.01618) or `text.train` alone.
    """
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
    init_from: Path | None = None
    """An adapter file to go on from, as a new run; its layers, method, rank and alpha must be this run's."""
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


class BackboneConfig(Section):
    """The frozen model underneath."""

    precision: Precision = "nf4"
    """Linear layers of the denoiser; what stays in 16 bits is listed when training starts."""
    text_encoders: Literal["int8", "nf4"] | None = None
    """Linear layers of the text encoders; None: as they compute."""
    keep_adaln: bool = False
    """The linear layers that make scales and shifts of the timestep stay in 16 bits too (a quarter of FLUX.1)."""
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class LossConfig(Section):
    """What is minimised. Held-out losses are mean squared errors whatever is set here."""

    kind: Literal["mse", "huber", "smooth_l1"] = "mse"
    """huber and smooth_l1 grow linearly beyond `delta`, so that odd pictures pull less."""
    delta: float = Field(0.1, gt=0)
    """Error from which huber and smooth_l1 are linear; latents have about unit variance."""
    snr_gamma: float | None = Field(None, gt=0)
    """min-SNR weighting (arXiv 2303.09556), such as 5, for epsilon and v; None: every timestep counts the same."""
    noise_offset: float = Field(0.0, ge=0, le=1)
    """For epsilon and v, such as 0.05: so much noise that is one number a channel, for very dark or bright pictures."""


class TimesConfig(Section):
    """Which noise levels are trained at. All but `emphasis` and `zero_snr` is for flows (SD3, FLUX, …)."""

    sampling: Literal["uniform", "logit-normal"] | None = None
    """None: logit-normal for flows (arXiv 2403.03206), uniform for timesteps."""
    mean: float = 0.0
    """Of the logit; below 0 is more detail, above 0 more composition."""
    std: float = Field(1.0, gt=0)
    """Of the logit."""
    emphasis: float = Field(0.0, ge=-1, le=1)
    """Above 0 more of the low noise that makes the look, below 0 more of the high noise that makes the layout."""
    shift: float | None = Field(None, gt=0)
    """Above 1 moves times to the noisy end; None: the base's own shift."""
    dynamic: bool = False
    """The shift that the base's scheduler has for the size of each picture (FLUX, Qwen-Image, Lumina 2, …)."""
    zero_snr: bool = False
    """For v: the last timestep is noise alone (arXiv 2305.08891), as it is where drawing begins."""


class PriorConfig(Section):
    """Keeping what the base knows of a class of things while one of them is learned."""

    kind: Literal["none", "teacher", "pictures"] = "none"
    """teacher: what the base says to the same pictures under the class's name; pictures: of the class, or drawn."""
    weight: float = Field(1.0, gt=0)
    """Of the second loss (arXiv 2208.12242 has 1)."""
    subject: str = ""
    """What the trigger is one of, such as "person"; also what the base draws and class pictures are captioned."""
    folder: Path | None = None
    """Pictures of the class; None: the base draws them once, into OUTPUT/class-pictures."""
    pictures: int = Field(100, ge=1)
    """How many the base draws."""
    steps: int = Field(30, ge=1)
    """Denoising steps of each."""
    guidance: float = Field(5.0, ge=0)


class TextConfig(Section):
    """What is trained of text encoders. Captions are then encoded at every step, and nothing of them is cached."""

    train: list[str] = Field(default_factory=list)
    """Components that get adapters too, such as ["text_encoder"]; the method is the adapter's."""
    lr: float = Field(1e-5, gt=0)
    """Of these adapters (kohya's SDXL guide)."""
    rank: int | None = Field(None, ge=1)
    """None: the adapter's rank; likewise alpha."""
    alpha: float | None = None
    targets: str | list[str] = "attention"
    tokens: dict[str, str] = Field(default_factory=dict)
    """New tokens and the word each begins as, such as {"<kiki>" = "cat"}; they are saved inside the adapter."""
    token_vectors: int = Field(1, ge=1, le=64)
    """Vectors of each."""
    token_lr: float = Field(3e-4, gt=0)
    """Of these vectors (cog-sdxl's `ti_lr`)."""

    @property
    def live(self) -> bool:
        """Whether text encoders are needed while training."""
        return bool(self.train or self.tokens)


class WatchConfig(Section):
    """What is looked at while training. None of it changes what is trained."""

    measure_every: int | None = Field(None, ge=1)
    """Steps between held-out losses; the best state is kept as NAME-best.safetensors. None: at the end alone."""
    tensorboard: bool = False
    """Losses, rate, gradient norm and pictures for TensorBoard, into OUTPUT/tensorboard."""
    every: int | None = Field(None, ge=1)
    """Steps between pictures; None: at the end alone."""
    prompts: list[str] = Field(default_factory=list)
    """What is drawn; none: nothing."""
    pictures: int = Field(4, ge=1)
    """Of each prompt, with the seeds `seed`, `seed` + 1, …"""
    weights: list[float] = [0.0, 0.5, 1.0]
    """Of the adapter, in the grid at the end."""
    seed: int = 0
    steps: int = Field(20, ge=1)
    """Denoising steps."""
    guidance: float = Field(5.0, ge=0)
    size: int | None = Field(None, ge=16, multiple_of=8)
    """Pixels; None: `data.resolution`."""


class LoopConfig(Section):
    """How long and how fast."""

    @model_validator(mode="before")
    @classmethod
    def _rate_that_it_finds(cls, given: Any) -> Any:
        return {"lr": 1.0} | given if isinstance(given, dict) and given.get("optimizer") == "prodigy" else given

    steps: int = Field(800, ge=1)
    exposures: int | None = Field(None, ge=1)
    """Stop sooner, once each picture has been seen so often; None: after `steps`."""
    batch: int = Field(4, ge=1)
    accumulate: int = Field(1, ge=1)
    """Batches added up for one optimiser step."""
    lr: float = Field(1e-4, gt=0)
    """1 for prodigy, which finds what to multiply it by."""
    optimizer: Literal[
        "adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "adafactor", "prodigy", "schedule-free"
    ] = "adamw"
    """Those in 8 bits, paged memory and adafactor hold less; `plan` says how much."""
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
    recompute: bool = False
    """Compute LayerNorm, GEGLU and the like again in backward: the same bits, a few percent slower, less memory.

    Does nothing beside `checkpointing` or `compile`.
    """
    compile: bool = False
    """torch.compile of the denoiser: minutes once for each shape of pictures, faster from then on."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints; Ctrl-C writes one as well."""
    seed: int = 0
