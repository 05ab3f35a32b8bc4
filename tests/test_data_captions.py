"""Caption variants: deterministic, the right words first, dropout at the rate asked for."""

from __future__ import annotations

import pytest

from lora_diffusion.data.captions import CaptionRules, caption_variants
from lora_diffusion.errors import ConfigError

TAGS = "fox, red, snow, night, moon"


def test_without_shuffle_there_is_one_variant_as_written() -> None:
    assert caption_variants("a fox, in  snow.", CaptionRules(), seed=1) == ("a fox, in  snow.",)


def test_shuffled_variants_hold_the_same_tags_and_keep_the_first() -> None:
    found = caption_variants(TAGS, CaptionRules(shuffle=True, keep_tokens=2, variants=4), seed=1)
    assert len(set(found)) == 4
    assert all(variant.startswith("fox, red, ") for variant in found)
    assert {tuple(sorted(variant.split(", "))) for variant in found} == {tuple(sorted(TAGS.split(", ")))}


def test_same_seed_same_variants_and_another_seed_others() -> None:
    rules = CaptionRules(shuffle=True)
    assert caption_variants(TAGS, rules, seed=1) == caption_variants(TAGS, rules, seed=1)
    assert caption_variants(TAGS, rules, seed=1) != caption_variants(TAGS, rules, seed=2)


def test_no_more_variants_than_there_are_orders() -> None:
    assert set(caption_variants("a, b", CaptionRules(shuffle=True, variants=9), seed=0)) == {"a, b", "b, a"}
    assert caption_variants("a", CaptionRules(shuffle=True, variants=9), seed=0) == ("a",)


def test_trigger_is_put_first_and_stays_there_unless_it_is_a_word_of_the_caption() -> None:
    rules = CaptionRules(trigger="sks", shuffle=True, variants=3)
    assert all(variant.startswith("sks, ") for variant in caption_variants(TAGS, rules, seed=0))
    assert caption_variants("a SKS fox", rules, seed=0) == ("a SKS fox",)
    assert caption_variants("a sksy fox", rules, seed=0) == ("sks, a sksy fox",)
    assert caption_variants("", rules, seed=0) == ("sks",)


def test_another_separator_is_kept() -> None:
    assert caption_variants("a; b", CaptionRules(trigger="t", separator=";"), seed=0) == ("t; a; b",)


@pytest.mark.parametrize("wrong", [{"dropout": 1.5}, {"variants": 0}, {"keep_tokens": -1}, {"separator": " "}])
def test_settings_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        CaptionRules(**wrong)
