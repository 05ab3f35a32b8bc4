"""What a sweep trains: the trials of `sweep.py`, from one configuration and the layers of its base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_diffusion import ConfigError, TargetError, TrainConfig
from lora_diffusion.adapter import DENOISERS
from lora_diffusion.families.skeletons import skeleton_of
from lora_diffusion.inspection.methods import count_parameters, has_rank, nearest_rank
from lora_diffusion.methods import METHODS
from lora_diffusion.targets import Targets, find_targets

TARGETS = ("attention-qv", "attention", "attention+ff", "attention+ff+conv")
#: layers of methods that are not defined on every layer
PLACES: dict[str, Targets] = {"vera": "attention+ff", "locon": "conv", "norm": "norm", "prefix": "attention-blocks"}
#: settings without which a method cannot come near the number of parameters
OWN: dict[str, dict[str, object]] = {"lokr": {"factor": 2}}
#: what trains a LoRA otherwise, compared beside the methods
VARIANTS = {
    "lora+": ("train.up_ratio=16",),
    "lora-fa": ("adapter.freeze_down=true",),
    "rslora": ("adapter.rslora=true",),
    "dylora": ("adapter.nested=true",),
    "pissa": ("adapter.init=pissa",),
    "olora": ("adapter.init=olora",),
    "loftq": ("adapter.init=loftq",),
    "eva": ("adapter.init=eva",),
}
#: learning rates over the configuration's: higher for few numbers and for such as multiply others, lower for weights.
#: Those of AdaLoRA and the prefix were raised after their first results, the others were set before any.
RATES = {"full": 0.1, "adalora": 5.0, "norm": 5.0, "ia3": 5.0, "vera": 5.0, "tokens": 5.0, "prefix": 10.0}
TOKEN, WORD, VECTORS = "<sweep>", "picture", 8  # prompt tuning: the new token, what it begins as, its vectors
TEXT_RATE = 0.5  # of the text encoder's adapters over the denoiser's


@dataclass(frozen=True)
class Trial:
    """One run: the settings in which it differs, how many numbers it trains, and its learning rate."""

    sweep: str
    name: str
    settings: tuple[str, ...]
    parameters: int
    lr: float


def plan(
    config: TrainConfig, sweeps: Iterable[str], ranks: Sequence[int], methods: str | None = None
) -> tuple[list[Trial], list[str]]:
    """The trials, and what is left out with the reason. ConfigError for a sweep that there is not."""
    models = skeleton_of(config.base)
    model = next(models[name] for name in DENOISERS if name in models)
    encoders = {name: encoder for name, encoder in models.items() if name.startswith("text_encoder")}
    trials, left_out = list[Trial](), list[str]()
    for sweep in sweeps:
        if sweep == "rank":
            trials += by_rank(config, model, ranks)
        elif sweep == "method":
            names = methods.split(",") if methods else [*METHODS, *VARIANTS, "tokens"]
            found, without = by_method(config, model, encoders, names)
            trials, left_out = trials + found, left_out + without
        elif sweep == "targets":
            found, without = by_targets(config, model, encoders)
            trials, left_out = trials + found, left_out + without
        else:
            raise ConfigError(f"no sweep {sweep!r}; there are rank, method and targets")
    return trials, left_out


def by_rank(config: TrainConfig, model: nn.Module, ranks: Sequence[int]) -> list[Trial]:
    """Each rank with alpha / rank as in the configuration."""
    adapter = config.adapter
    layers = list(find_targets(model, adapter.targets).values())
    return [
        Trial(
            "rank",
            str(rank),
            (f"adapter.rank={rank}", _alpha(config, rank)),
            count_parameters(adapter.method, layers, rank, adapter.settings) or 0,
            config.train.lr,
        )
        for rank in ranks
    ]


def _alpha(config: TrainConfig, rank: int) -> str:
    """The setting that keeps the configuration's alpha / rank."""
    adapter = config.adapter
    return f"adapter.alpha={rank if adapter.alpha is None else adapter.alpha / adapter.rank * rank}"


def by_method(
    config: TrainConfig, model: nn.Module, encoders: Mapping[str, nn.Module], names: Sequence[str]
) -> tuple[list[Trial], list[str]]:
    """Each method with the rank whose parameters come nearest to those of the configuration's own."""
    adapter = config.adapter
    layers = list(find_targets(model, adapter.targets).values())
    wanted = count_parameters(adapter.method, layers, adapter.rank, adapter.settings) or 0
    trials, left_out = list[Trial](), list[str]()
    for name in names:
        try:
            trials.append(_tokens(config, encoders) if name == "tokens" else _method(config, model, name, wanted))
        except (ConfigError, TargetError) as error:
            left_out.append(f"method {name}: {error}")
    return trials, left_out


def _method(config: TrainConfig, model: nn.Module, name: str, wanted: int) -> Trial:
    """A trial of a method, or of a variant of LoRA. ConfigError or TargetError where the model has no layer for it."""
    adapter, more = config.adapter, VARIANTS.get(name, ())
    method = "lora" if name in VARIANTS else name
    targets: Targets = adapter.targets
    if not all(METHODS[method].supports(layer) for layer in find_targets(model, targets).values()):
        if name not in PLACES:
            raise ConfigError(f"it is not defined on all of {targets}")
        targets = PLACES[name]
    layers = list(find_targets(model, targets).values())
    own = dict(adapter.settings) if name == adapter.method else OWN.get(name, {})
    counted = {"freeze_down": True} if name == "lora-fa" else own
    rank = nearest_rank(method, layers, wanted, counted) if has_rank(method) else 1
    lr = config.train.lr * RATES.get(name, 1.0)
    settings = [f"adapter.method={method}", f"adapter.rank={rank}", f"train.lr={lr}", *more]
    settings += [] if method == "oft" else [_alpha(config, rank)]  # there it is a bound
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in own.items())
    settings += [] if own == adapter.settings else [f"adapter.settings={{{table}}}"]
    settings += [] if targets == adapter.targets else [f"adapter.targets={json.dumps(targets)}"]
    return Trial("method", name, tuple(settings), count_parameters(method, layers, rank, counted) or 0, lr)


def _tokens(config: TrainConfig, encoders: Mapping[str, nn.Module]) -> Trial:
    """Prompt tuning: vectors of a new token in front of every caption, and no layer (arXiv 2104.08691, 2208.01618)."""
    places = [encoder for encoder in encoders.values() if "CLIP" in type(encoder).__name__] or list(encoders.values())
    if not places:
        raise ConfigError("the base has no text encoder")
    lr = config.train.lr * RATES["tokens"]
    settings = (
        "adapter.targets=[]",
        f"data.trigger={' '.join([TOKEN, config.data.trigger]).strip()}",
        f'text.tokens={{"{TOKEN}" = "{WORD}"}}',
        f"text.token_vectors={VECTORS}",
        f"text.token_lr={lr}",
    )
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in places]  # type: ignore[operator]
    return Trial("method", "tokens", settings, VECTORS * sum(widths), lr)


def by_targets(
    config: TrainConfig, model: nn.Module, encoders: Mapping[str, nn.Module]
) -> tuple[list[Trial], list[str]]:
    """Each set of layers at the configuration's rank, the largest with text encoders beside it too."""
    adapter, trials, left_out = config.adapter, list[Trial](), list[str]()

    def count(part: nn.Module, targets: Targets, rank: int) -> int:
        return count_parameters(adapter.method, list(find_targets(part, targets).values()), rank, adapter.settings) or 0

    for targets in TARGETS:
        try:
            numbers = count(model, targets, adapter.rank)
        except TargetError as error:
            left_out.append(f"targets {targets}: {error}")
            continue
        trials.append(
            Trial(
                "targets",
                targets,
                (f"adapter.targets={targets}", _alpha(config, adapter.rank)),
                numbers,
                config.train.lr,
            )
        )
    clip = [name for name, encoder in encoders.items() if "CLIP" in type(encoder).__name__]
    if not clip or not trials:
        return trials, [*left_out, "targets text: the base has no CLIP encoder"]
    largest, rank = trials[-1], config.text.rank or adapter.rank
    numbers = largest.parameters + sum(count(encoders[name], config.text.targets, rank) for name in clip)
    more = (f"text.train={json.dumps(clip)}", f"text.lr={TEXT_RATE * config.train.lr}")
    trials.append(Trial("targets", f"{largest.name}+text", (*largest.settings, *more), numbers, config.train.lr))
    return trials, left_out
