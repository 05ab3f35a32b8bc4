"""Weight specifications: what a user says about an adapter's strength -> one number for each layer.

0.8                                        everywhere
{"unet": 1.0, "text_encoder": 0.5}         by component; "denoiser" is the unet or transformer; others 0
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from lora_diffusion.adapter import DENOISERS
from lora_diffusion.errors import ConfigError, TargetError, did_you_mean

Weight = float | Mapping[str, float]


def check_weight(weight: Weight, components: Collection[str], adapter: str) -> None:
    """ConfigError for a weight that is no finite number, TargetError for a component that does not exist."""
    known = {*components, *(["denoiser"] if any(c in DENOISERS for c in components) else [])}
    parts = weight.items() if isinstance(weight, Mapping) else [("", weight)]
    for component, number in parts:
        if component and component not in known:
            hint = did_you_mean(component, known)
            raise TargetError(
                f"adapter {adapter!r}: no component {component!r}; there are {', '.join(sorted(known))}{hint}"
            )
        if isinstance(number, bool) or not _finite(number):
            raise ConfigError(f"adapter {adapter!r}: weight {number!r} is not a finite number")


def weight_of(weight: Weight, component: str) -> float:
    """The number for one component; a component that a mapping does not name gets 0."""
    if not isinstance(weight, Mapping):
        return float(weight)
    if component in weight:
        return float(weight[component])
    return float(weight.get("denoiser", 0.0)) if component in DENOISERS else 0.0


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)
