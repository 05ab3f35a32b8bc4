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


def test_shares_say_how_often_an_epoch_shows_a_picture() -> None:
    items = [Item(str(i), torch.zeros(1, 2, 2), (1,), share) for i, share in enumerate((3.0, 1.0, 0.5, 0.5))]
    drawn = Batches(items, {"states": torch.zeros(2, 1)}, size=1, seed=0)
    counts = Counter[str]()
    for epoch in range(40):
        names = [drawn.draw(5 * epoch + i).names[0] for i in range(5)]
        assert (names.count("0"), names.count("1"), names.count("2") + names.count("3")) == (3, 1, 1)
        counts.update(names)
    assert 8 < counts["2"] < 32


def test_masks_go_with_their_pictures() -> None:
    half = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    items = [Item("masked", torch.zeros(1, 2, 2), (0,), mask=half), Item("whole", torch.zeros(1, 2, 2), (0,))]
    (batch,) = Batches(items, {"states": torch.zeros(1, 1)}, size=2, seed=0).in_order()
    assert batch.masks is not None
    assert torch.equal(batch.masks[0, 0], half)
    assert bool(batch.masks[1].eq(1).all())
