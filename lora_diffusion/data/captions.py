"""Trigger word, tag shuffle and dropout, as a fixed number of variants that can be cached.

A text encoder runs once per variant; dropout does not need one, because an empty caption is the same for all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from lora_diffusion.errors import ConfigError

__all__ = ["CaptionRules", "caption_variants", "named"]


@dataclass(frozen=True)
class CaptionRules:
    """What is done to every caption.

    trigger      put first where the caption does not hold it as a word of its own
    shuffle      the order of the tags between separators changes from variant to variant
    keep_tokens  so many tags stay at the front (the trigger is not counted, and always stays)
    dropout      share of draws, 0..1, in which the caption is empty
    variants     how many there are when shuffling
    """

    trigger: str | None = None
    shuffle: bool = False
    keep_tokens: int = 0
    separator: str = ","
    dropout: float = 0.0
    variants: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise ConfigError(f"caption dropout is {self.dropout}; expected a share between 0 and 1")
        if self.variants < 1 or self.keep_tokens < 0 or not self.separator.strip():
            found = f"variants {self.variants}, keep_tokens {self.keep_tokens}, separator {self.separator!r}"
            raise ConfigError(f"captions: {found}; expected at least 1, at least 0 and a visible character")


def caption_variants(caption: str, rules: CaptionRules, *, seed: int) -> tuple[str, ...]:
    """The captions to encode: one, or up to `rules.variants` different ones. The same arguments, the same captions."""
    head = _missing_trigger(caption, rules.trigger)
    tags = [tag.strip() for tag in caption.split(rules.separator) if tag.strip()]
    if not rules.shuffle or len(tags) - rules.keep_tokens < 2:
        return (_join([*head, caption.strip()] if caption.strip() else head, rules.separator),)
    random = Random(f"{seed}/{caption}")
    fixed, free = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    found: dict[str, None] = {}
    for _ in range(8 * rules.variants):  # two tags have two orders, however many variants are wanted
        random.shuffle(free)
        found.setdefault(_join([*head, *fixed, *free], rules.separator))
        if len(found) == rules.variants:
            break
    return tuple(found)


def named(caption: str, trigger: str, subject: str) -> str:
    """`caption` with `subject` wherever it has `trigger` as a word of its own: "photo of sks" -> "photo of dog"."""
    return re.sub(_word(trigger), lambda _: subject, caption, flags=re.IGNORECASE)


def _missing_trigger(caption: str, trigger: str | None) -> list[str]:
    if not trigger or re.search(_word(trigger), caption, re.IGNORECASE):
        return []
    return [trigger]


def _word(trigger: str) -> str:
    return rf"(?<!\w){re.escape(trigger)}(?!\w)"


def _join(tags: list[str], separator: str) -> str:
    return f"{separator.rstrip()} ".join(tags)
