"""Starts of a LoRA against PEFT's: the same factors, the same forward, the same file on the untouched base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_diffusion.attachment import attach
from lora_diffusion.beginning import eva_start, loftq_start
from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.methods import new_method
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.quantize import dequantize, quantize

X = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"to_q": nn.Linear(12, 10), "to_k": nn.Linear(12, 8)})


class Called(nn.Module):
    """A model that PEFT can call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner["to_q"](x), self.inner["to_k"](x)], dim=1)


def train(call: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        call(X).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_weight_is_pefts_and_its_file_fits_the_untouched_base(init: str, tmp_path: Path) -> None:
    """Trained alike; ours as written computes on the plain base what PEFT's converted file and what training did."""
    theirs = get_peft_model(
        Called(), LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=init)
    )
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, to convert against the start
    theirs.save_pretrained(tmp_path / "start")
    ours = Called()
    before, weights = ours(X).detach(), copy.deepcopy(ours.state_dict())
    with attach(ours, LoRA(3, 6.0, init=init), ["*to_*"]) as attachment:  # type: ignore[arg-type]
        torch.testing.assert_close(ours(X), before, rtol=1e-5, atol=1e-5)
        slot, peer = attachment.slots["inner.to_q"], theirs.base_model.model.inner["to_q"]
        torch.testing.assert_close(slot.up.t() @ slot.down, peer.lora_B.default.weight @ peer.lora_A.default.weight)
        train(ours, attachment.parameters())
        train(theirs, [p for p in theirs.parameters() if p.requires_grad])
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-4)
        trained, adapter = ours(X).detach(), attachment.adapter("a")
        attachment.load(adapter)
        torch.testing.assert_close(ours(X), trained, rtol=0, atol=0)
        attachment.weigh(0.0)
        assert torch.equal(ours(X), before)
    assert all(torch.equal(value, weights[key]) for key, value in ours.state_dict().items())
    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(tmp_path / "mine", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = PeftModel.from_pretrained(Called(), tmp_path / "mine")
    for name, layer in adapter.layers["unet"].items():
        peer = converted.base_model.model.get_submodule(name)
        assert layer.tensors["down"].shape[0] == 6
        found = LoRA.delta(layer, ours.get_submodule(name))
        torch.testing.assert_close(found, peer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    with attach(ours, LoRA(6), ["*to_*"]) as plain:
        for name, slot in plain.slots.items():
            slot.pack(ours.get_submodule(name), [LoRA.part("a", adapter.layers["unet"][name], nn.Linear(1, 1))])
            slot.weigh({"a": 1.0})
        torch.testing.assert_close(ours(X), trained, rtol=1e-4, atol=1e-4)


def test_gaussian_has_pefts_deviation() -> None:
    down = LoRA(8, init="gaussian").fresh(nn.Linear(4000, 4)).tensors["down"]
    assert abs(down.std().item() * 8 - 1) < 0.02


def test_loftq_takes_up_what_nf4_lost() -> None:
    whole, packed = nn.ModuleDict({"to_q": nn.Linear(64, 64)}), nn.ModuleDict()
    packed["to_q"] = copy.deepcopy(whole["to_q"])
    quantize(packed, "nf4", compute_dtype=torch.float32)
    weights = {"to_q.weight": whole["to_q"].weight.detach()}
    lost = weights["to_q.weight"] - dequantize(packed["to_q"])
    start = loftq_start(packed, {"to_q": LoRA(8, 4.0)}, weights)
    U, S, Vh = torch.linalg.svd(lost)
    torch.testing.assert_close(
        LoRA.delta(start["to_q"], whole["to_q"]), U[:, :8] * S[:8] @ Vh[:8], rtol=1e-4, atol=1e-5
    )
    x = torch.randn(5, 64)
    goal, plain = whole["to_q"](x), packed["to_q"](x)
    with attach(packed, LoRA(8, 4.0), fresh=start) as attachment:
        assert (packed["to_q"](x) - goal).norm() < 0.85 * (plain - goal).norm()
        written = attachment.adapter("a").layers["unet"]["to_q"]
        assert LoRA.delta(written, whole["to_q"]).abs().max() < 1e-6  # nothing was trained
    with pytest.raises(ConfigError, match="no target layer is quantised"):
        loftq_start(whole, {"to_q": LoRA(8)}, weights)
    with pytest.raises(ConfigError, match="no original weight of 'to_q'"):
        loftq_start(packed, {"to_q": LoRA(8)}, {})


def test_eva_spans_what_a_layer_sees() -> None:
    layer = nn.Linear(12, 5)
    seen = X * torch.linspace(3, 0.1, 12)
    start = eva_start({"to_q": layer}, {"to_q": LoRA(3)}, lambda: [layer(seen[:4]), layer(seen[4:])])["to_q"]
    expected = torch.linalg.svd(seen, full_matrices=False)[2][:3]
    torch.testing.assert_close((start.tensors["down"] @ expected.t()).abs(), torch.eye(3), rtol=0, atol=1e-4)
    assert not start.tensors["up"].any()
    assert not layer._forward_pre_hooks
    with pytest.raises(ConfigError, match="saw no input"):
        eva_start({"to_q": layer}, {"to_q": LoRA(3)}, lambda: None)


def test_a_rank_beyond_the_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 11"):
        LoRA(11, init="pissa").fresh(nn.Linear(12, 10))
    with pytest.raises(ConfigError, match="above 0"):
        LoRA(4, 0.0, init="pissa").fresh(nn.Linear(12, 10))
    with pytest.raises(ConfigError, match=r"dora.*init"):
        new_method("dora", rank=4, init="pissa")


def test_with_a_frozen_down_only_rank_numbers_a_token_are_kept() -> None:
    """LoRA-FA: `down` stays, `up` has LoRA's own gradient, and the input is not saved for backward."""
    gradients: list[Tensor] = []
    for frozen in (False, True):
        net, x = model(), X.clone().requires_grad_()
        saved: list[int] = []
        method = LoRA(2, freeze_down=frozen)
        with attach(net, method, "to_q", generator=torch.Generator().manual_seed(3)) as attachment:
            slot = attachment.slots["to_q"]
            slot.up.data.fill_(0.3)
            out = net["to_q"](x)

            def note(tensor: Tensor, saved: list[int] = saved) -> Tensor:
                saved.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                added = slot(x, out)
            added.square().sum().backward()
            assert slot.up.grad is not None
            assert x.grad is not None
            gradients += [slot.up.grad.clone(), x.grad.clone()]
            assert (slot.down.grad is None) == frozen
            assert [name for name, _ in attachment.named_parameters()] == (
                ["to_q.up"] if frozen else ["to_q.down", "to_q.up"]
            )
            assert (x.numel() in saved) != frozen
            assert attachment.adapter("a").layers["unet"]["to_q"].tensors.keys() == {"down", "up"}
    torch.testing.assert_close(gradients[:2], gradients[2:])


def test_ranks_and_alphas_by_glob() -> None:
    ranks, alphas = {"*": 5, "to_k": 2}, {"to_k": 1.0}
    with attach(model(), LoRA(3, 6.0), "attention", ranks=ranks, alphas=alphas) as attachment:
        found = attachment.adapter("a").layers["unet"]
    assert {name: (len(layer.tensors["down"]), layer.alpha) for name, layer in found.items()} == {
        "to_q": (5, 6.0),
        "to_k": (2, 1.0),
    }
    with pytest.raises(TargetError, match=r"rank of 'to_v'"):
        attach(model(), LoRA(3), ranks={"to_v": 4})
    with pytest.raises(ConfigError, match=r"ia3.*no rank"):
        attach(model(), new_method("ia3"), ranks={"to_q": 4})


def test_a_norm_is_capped_and_a_shorter_one_is_left() -> None:
    net = model()
    with attach(net, LoRA(3, 6.0)) as attachment:
        for slot, size in zip(attachment.slots.values(), (10.0, 1e-4), strict=True):
            slot.up.data.normal_().mul_(size)
        before = attachment.adapter("before").layers["unet"]
        assert attachment.cap(0.5) == 1
        after = attachment.adapter("after").layers["unet"]
    assert after["to_k"] == before["to_k"]
    norm = LoRA.delta(after["to_q"], net["to_q"]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5))
    cosine = nn.functional.cosine_similarity(
        LoRA.delta(after["to_q"], net["to_q"]).flatten(), LoRA.delta(before["to_q"], net["to_q"]).flatten(), dim=0
    )
    torch.testing.assert_close(cosine, torch.tensor(1.0))
