"""Batches: everything comes as often as asked, one group a batch, the same after resuming at any point."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from lora_diffusion.data.sampler import Batch, BatchSampler, Draw
from lora_diffusion.errors import ConfigError, DataError

DRAWS = [Draw("wide")] * 7 + [Draw("tall")] * 4 + [Draw("square", share=3)] * 2


def _take(sampler: BatchSampler, count: int) -> list[Batch]:
    return list(islice(iter(sampler), count))


def test_an_epoch_holds_every_draw_as_often_as_its_share_says_in_batches_of_one_group() -> None:
    batches = BatchSampler(DRAWS, 3, seed=1).batches_of(0)
    assert Counter(i for batch in batches for i in batch) == {**dict.fromkeys(range(11), 1), 11: 3, 12: 3}
    assert all(len({DRAWS[i].group for i in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == 3
    assert len(batches) == 3 + 2 + 2


def test_order_changes_with_epoch_and_seed_and_with_nothing_else() -> None:
    sampler = BatchSampler(DRAWS, 3, seed=1)
    assert sampler.batches_of(0) == BatchSampler(DRAWS, 3, seed=1).batches_of(0)
    assert sampler.batches_of(0) != sampler.batches_of(1)
    assert sampler.batches_of(0) != BatchSampler(DRAWS, 3, seed=2).batches_of(0)


@pytest.mark.parametrize("done", range(20))
def test_resumed_anywhere_the_rest_is_the_same(done: int) -> None:
    whole = _take(BatchSampler(DRAWS, 3, seed=1), 30)
    first = BatchSampler(DRAWS, 3, seed=1)
    assert _take(first, done) == whole[:done]
    second = BatchSampler(DRAWS, 3, seed=1)
    second.restore(first.state())
    assert _take(second, 30 - done) == whole[done:]


def test_batches_say_where_they_stand() -> None:
    places = [(batch.epoch, batch.position) for batch in _take(BatchSampler(DRAWS, 3), 15)]
    assert places == [(0, n) for n in range(7)] + [(1, n) for n in range(7)] + [(2, 0)]


def test_fractional_shares_come_that_often_on_average() -> None:
    sampler = BatchSampler([Draw("a", 0.25), Draw("a", 1.5), Draw("a")], 1)
    seen = Counter(i for epoch in range(400) for batch in sampler.batches_of(epoch) for i in batch)
    assert seen[2] == 400
    assert abs(seen[0] / 400 - 0.25) < 0.07
    assert abs(seen[1] / 400 - 1.5) < 0.08


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_an_epoch_between_them_and_get_equally_many(world: int) -> None:
    alone = BatchSampler(DRAWS, 2, seed=4).batches_of(0)
    shares = [BatchSampler(DRAWS, 2, seed=4, rank=r, world=world).batches_of(0) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    interleaved = [batch for step in zip(*shares, strict=True) for batch in step]
    assert interleaved[: len(alone)] == alone
    assert len(interleaved) - len(alone) < world


def test_an_epoch_without_draws_is_passed_over() -> None:
    batches = _take(BatchSampler([Draw("a", 0.1)], 4), 3)
    assert [batch.members for batch in batches] == [(0,)] * 3


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        BatchSampler([], 2)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        BatchSampler(DRAWS, 0)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        BatchSampler(DRAWS, 1, rank=2, world=2)
    with pytest.raises(ConfigError, match="made with seed 9"):
        BatchSampler(DRAWS, 1).restore({"seed": 9, "epoch": 0, "position": 0})
