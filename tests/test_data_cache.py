"""Cached tensors: keyed by everything they depend on, atomic, remade when damaged, bounded in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_diffusion.data.buckets import BucketRules, views
from lora_diffusion.data.cache import TensorCache, content_key
from lora_diffusion.errors import DataError


def _make(numbers: Sequence[int]) -> list[dict[str, Tensor]]:
    return [{"latents": torch.full((4, 8), float(n)), "half": torch.tensor([n], dtype=torch.bfloat16)} for n in numbers]


def _wanted(count: int) -> dict[str, int]:
    return {content_key(number=n): n for n in range(count)}


def test_key_depends_on_every_part_and_not_on_their_order() -> None:
    first, second = views((100, 80), BucketRules(resolutions=(64,), step=8, flip=True), seed=0)
    key = content_key(picture="abc", view=first, model="m", dtype=torch.bfloat16)
    assert key == content_key(dtype=torch.bfloat16, model="m", view=first, picture="abc")
    others = [
        content_key(picture="abd", view=first, model="m", dtype=torch.bfloat16),
        content_key(picture="abc", view=second, model="m", dtype=torch.bfloat16),
        content_key(picture="abc", view=first, model="n", dtype=torch.bfloat16),
        content_key(picture="abc", view=first, model="m", dtype=torch.float16),
    ]
    assert len({key, *others}) == 5
    with pytest.raises(TypeError, match="cannot hold a object"):
        content_key(thing=object())


def test_entries_come_back_bit_for_bit_from_a_new_cache(tmp_path: Path) -> None:
    wanted = _wanted(5)
    assert TensorCache(tmp_path).fill(wanted, _make, batch=2) == 5
    again = TensorCache(tmp_path)
    assert again.fill(wanted, _refuse) == 0
    for key, number in wanted.items():
        entry = again[key]
        assert torch.equal(entry["latents"], torch.full((4, 8), float(number)))
        assert entry["half"].dtype == torch.bfloat16
    assert "absent" not in again
    with pytest.raises(KeyError):
        again["absent"]


def _refuse(_: Sequence[int]) -> list[dict[str, Tensor]]:
    raise AssertionError("nothing was missing")


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_file_is_made_again_and_only_that_one(tmp_path: Path, damage: str) -> None:
    wanted = _wanted(3)
    TensorCache(tmp_path).fill(wanted, _make)
    victim, number = list(wanted.items())[1]
    path = TensorCache(tmp_path).path(victim)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"truncate": content[:-9], "flip": content, "empty": b"", "text": b"<html>"}[damage])
    made: list[int] = []
    cache = TensorCache(tmp_path)
    assert cache.get(victim) is None
    assert cache.fill(wanted, lambda numbers: made.extend(numbers) or _make(numbers)) == 1
    assert made == [number]
    assert torch.equal(TensorCache(tmp_path)[victim]["latents"], torch.full((4, 8), float(number)))


def test_an_interrupted_fill_keeps_what_is_done_and_leaves_no_drafts(tmp_path: Path) -> None:
    wanted = _wanted(6)

    def stops(numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        if 4 in numbers:
            raise KeyboardInterrupt
        return _make(numbers)

    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path).fill(wanted, stops, batch=2)
    seen: list[tuple[int, int]] = []
    assert TensorCache(tmp_path).fill(wanted, _make, progress=lambda *at: seen.append(at)) == 2
    assert seen == [(6, 6)]
    assert not list(tmp_path.rglob("*.part"))


def test_memory_is_bounded_and_recent_entries_are_kept(tmp_path: Path) -> None:
    wanted = _wanted(10)
    one = 4 * 8 * 4 + 2
    cache = TensorCache(tmp_path, memory=3 * one)
    cache.fill(wanted, _make)
    keys = list(wanted)
    kept = [key for key in keys if cache.get(key) is cache.get(key)]
    assert kept == keys  # a hit is held; below, only three are held at a time
    held = {key: cache[key] for key in keys[:3]}
    assert all(cache[key] is entry for key, entry in held.items())
    cache[keys[5]]
    assert cache[keys[2]] is held[keys[2]]
    assert cache[keys[0]] is not held[keys[0]]
    small = TensorCache(tmp_path, memory=0)
    assert small[keys[0]] is not small[keys[0]]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file")
    with pytest.raises(DataError, match="the cache cannot be written"):
        cache.put("ab", _make([1])[0])


def test_views_of_tensors_can_be_stored(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    TensorCache(tmp_path).put("ab", {"part": whole[:, 1].T})
    assert torch.equal(TensorCache(tmp_path)["ab"]["part"], whole[:, 1].T)
