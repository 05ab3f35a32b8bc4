"""Which pictures make up which batch is a function of seed and number."""

from __future__ import annotations

from collections import Counter

import torch

from lora_diffusion.training.batches import Batches, Item


def batches(count: int, size: int, **more: float) -> Batches:
    items = [Item(str(i), torch.full((1, 2, 2 + 2 * (i % 2)), float(i)), (1 + i,)) for i in range(count)]
    table = {"states": torch.arange(count + 1.0)[:, None]}
    return Batches(items, table, size=size, seed=3, **more)


def test_every_picture_once_an_epoch_and_shapes_never_mix() -> None:
    drawn = batches(8, 2)
    for epoch in range(3):
        names = [name for i in range(4) for name in drawn.draw(4 * epoch + i).names]
        assert Counter(names) == Counter(map(str, range(8)))


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    once, again = batches(9, 4), batches(9, 4)
    forward = [once.draw(i).names for i in range(12)]
    assert [again.draw(i).names for i in reversed(range(12))][::-1] == forward
    assert len(set(forward)) > 6


def test_captions_follow_their_pictures_and_drop_out() -> None:
    batch = batches(8, 4).draw(0)
    assert batch.conditioning["states"].flatten().tolist() == [1.0 + int(name) for name in batch.names]
    assert not batches(8, 4, dropout=1.0).draw(0).conditioning["states"].any()


def test_fewer_pictures_than_a_batch_are_repeated() -> None:
    assert len(batches(1, 4).draw(5).names) == 4


def test_in_order_shows_everything_once() -> None:
    assert sorted(n for b in batches(7, 3).in_order() for n in b.names) == sorted(map(str, range(7)))
