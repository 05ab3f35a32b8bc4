"""Random gates: what each drops, what stays in the mean, and that a nested pair is an adapter of every rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_diffusion.attachment import attach
from lora_diffusion.dropping import Dropping
from lora_diffusion.errors import ConfigError
from lora_diffusion.methods import new_method
from lora_diffusion.methods.lora import LoRA

GATE = torch.tensor([0.5, 1.0, 2.0, 4.0])


def drawn(dropping: Dropping, times: int = 2000) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.stack([dropping.rows(GATE, 3, (5,)).expand(3, 5, 4) for _ in range(times)])


@pytest.mark.parametrize("dropping", [Dropping(token=0.25), Dropping(rank=0.25), Dropping(token=0.2, rank=0.2)])
def test_rows_keep_their_mean(dropping: Dropping) -> None:
    torch.testing.assert_close(drawn(dropping).mean(dim=0), GATE.expand(3, 5, 4), rtol=0.1, atol=0)


def test_what_is_dropped_together() -> None:
    by_rank, by_module, nested = (
        drawn(d, 50) for d in (Dropping(rank=0.5), Dropping(module=0.5), Dropping(nested=True))
    )
    assert all((by_rank == by_rank[:, :, :1]).flatten())
    assert not torch.equal(by_rank[:, 0], by_rank[:, 1])
    off = by_module == 0
    assert set(off.flatten(1).sum(dim=1).tolist()) == {0, off[0].numel()}
    assert set((nested > 0).sum(dim=-1).flatten().tolist()) == {1, 2, 3, 4}
    assert all((nested > 0).int().diff(dim=-1).flatten() <= 0)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3)], ids=["linear", "conv"])
def test_the_first_rows_of_a_nested_pair_are_an_adapter(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"to_q": layer})
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 4, 4)
    with attach(model, LoRA(4), "to_q", dropout=Dropping(nested=True)) as attachment:
        slot = attachment.slots["to_q"].train()
        slot.up.data.normal_()
        monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(1))  # b = 2
        nested = model["to_q"](x)
        slot.down.data[2:] = 0
        torch.testing.assert_close(nested, slot.eval() and model["to_q"](x))


def test_a_branch_is_left_out_whole_and_has_no_rows_to_drop() -> None:
    model, x = nn.ModuleDict({"to_q": nn.Linear(8, 8)}), torch.randn(3, 8)
    base = model["to_q"](x)
    with attach(model, new_method("loha", rank=2), dropout=Dropping(module=0.5)) as attachment:
        for parameter in attachment.parameters():
            parameter.data.normal_()
        attachment.slots["to_q"].train()
        torch.manual_seed(0)
        same = [torch.equal(model["to_q"](x), base) for _ in range(30)]
        assert 5 < sum(same) < 25
    for dropping in (Dropping(rank=0.1), Dropping(nested=True)):
        with pytest.raises(ConfigError, match="no rank axis"):
            attach(model, new_method("loha", rank=2), dropout=dropping)


def test_a_probability_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank dropout is 1"):
        Dropping(rank=1.0)
