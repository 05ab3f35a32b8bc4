"""Prefix tuning against Diffusers' own decoupled attention, on every kind of attention, and that it is no matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import nn

from lora_diffusion import Adapter, AdapterStack, ConfigError, LayerAdapter, TrainConfig, load_adapter, merge, train
from lora_diffusion.attachment import attach
from lora_diffusion.errors import TargetError
from lora_diffusion.gates.masks import Region
from lora_diffusion.inspection.methods import count_parameters
from lora_diffusion.merging import bake
from lora_diffusion.merging.conflicts import conflicts
from lora_diffusion.methods.prefix import Prefix, queries
from lora_diffusion.quantize import fingerprint
from lora_diffusion.targets import find_targets
from tests import tiny
from tests.training.pictures import settings


def prefixes(pipe: Any, component: str, tokens: int = 3) -> Adapter:
    """Random keys and values on every whole attention."""
    layers: dict[str, LayerAdapter] = {}
    for name, layer in find_targets(getattr(pipe, component), "attention-blocks").items():
        layers[name] = Prefix(tokens).fresh(layer)
        layers[name].tensors["v"].normal_()
    return Adapter("prefix", {component: layers})


def test_it_is_the_decoupled_attention_of_diffusers() -> None:
    """An IP-Adapter whose picture tokens are one-hot has our keys and values as the columns of its projections."""
    attention = Attention(16, cross_attention_dim=20, heads=2, dim_head=12).requires_grad_(False)
    x, text = torch.randn(2, 7, 16), torch.randn(2, 5, 20)
    new = Prefix(4).fresh(attention)
    new.tensors["v"].normal_()
    with attach(nn.ModuleDict({"attn2": attention}), Prefix(4), "attn2") as attachment:
        for key, parameter in attachment.named_parameters():
            parameter.data.copy_(new.tensors[key.rpartition(".")[2]])
        attachment.weigh(0.7)
        ours = attention(x, encoder_hidden_states=text)
    theirs = IPAdapterAttnProcessor2_0(24, cross_attention_dim=4, num_tokens=(4,), scale=0.7)
    theirs.to_k_ip[0].weight.data.copy_(new.tensors["k"].t())
    theirs.to_v_ip[0].weight.data.copy_(new.tensors["v"].t())
    attention.set_processor(theirs)
    with torch.no_grad():
        expected = attention(x, encoder_hidden_states=(text, [torch.eye(4).expand(2, 4, 4)]))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["sd", "sd3", "flux"])
def test_on_pipelines_weights_are_linear_and_0_is_the_base(base: str) -> None:
    """U-Net, joint attention with query norms, joint attention with rotary embeddings."""
    pipe = getattr(tiny, base)(**({"qk_norm": "rms_norm"} if base == "sd3" else {}))
    component = "unet" if base == "sd" else "transformer"
    adapter = prefixes(pipe, component)
    plain, before, tree = tiny.picture(pipe), fingerprint(getattr(pipe, component)), repr(getattr(pipe, component))
    with AdapterStack(pipe) as stack:
        stack.add(adapter, 0.5)
        assert np.abs(tiny.picture(pipe) - plain).max() > 1e-4
        stack.weigh("prefix", 0.0)
        np.testing.assert_array_equal(tiny.picture(pipe), plain)
    np.testing.assert_array_equal(tiny.picture(pipe), plain)
    assert (fingerprint(getattr(pipe, component)), repr(getattr(pipe, component))) == (before, tree)


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_in_joint_attention_the_pictures_tokens_get_it_and_the_texts_stay(base: str) -> None:
    pipe = getattr(tiny, base)(**({"qk_norm": "rms_norm"} if base == "sd3" else {}))
    name, attention = next(iter(find_targets(pipe.transformer, "attention-blocks").items()))
    width, context = attention.to_q.in_features, attention.add_k_proj.in_features
    x, text = torch.randn(2, 6, width), torch.randn(2, 3, context)
    adapter = Prefix(5).fresh(attention)
    adapter.tensors["v"].normal_()
    with torch.no_grad():
        base_picture, base_text = attention(hidden_states=x, encoder_hidden_states=text)
        with AdapterStack(pipe) as stack:
            stack.add(Adapter("p", {"transformer": {name: adapter}}), 0.6)
            picture, said = attention(hidden_states=x, encoder_hidden_states=text)
        q = queries(attention, x)
        normed = attention.norm_q(attention.to_q(x).unflatten(-1, (attention.heads, -1))).transpose(1, 2)
        torch.testing.assert_close(q, normed)
        k, v = (adapter.tensors[key].unflatten(-1, (attention.heads, -1)).transpose(0, 1) for key in ("k", "v"))
        found = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        expected = base_picture + 0.6 * found.transpose(1, 2).flatten(2) @ attention.to_out[0].weight.t()
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(said, base_text)


def test_sliced_attention_and_images_of_their_own_weight_are_served() -> None:
    pipe = tiny.sd()
    adapter = prefixes(pipe, "unet")
    with AdapterStack(pipe) as stack:
        stack.add(adapter, [0.0, 1.0])
        both = tiny.picture(pipe, ["x", "x"])
        pipe.enable_attention_slicing()
        np.testing.assert_allclose(tiny.picture(pipe, ["x", "x"]), both, atol=1e-5)
        stack.weigh("prefix", 0.0)
        first = tiny.picture(pipe, ["x", "x"])
    np.testing.assert_allclose(both[0], first[0], atol=1e-5)
    assert np.abs(both[1] - first[1]).max() > 1e-4


def test_weights_by_component_block_region_and_step_reach_whole_attentions() -> None:
    pipe = tiny.sd()
    adapter = prefixes(pipe, "unet")
    half = np.zeros((32, 32), np.float32)
    half[:, :16] = 1
    with AdapterStack(pipe) as stack:
        stack.add(adapter, 0.0)
        plain = tiny.picture(pipe)
        stack.weigh("prefix", 0.5)
        everywhere = tiny.picture(pipe)
        stack.weigh("prefix", {"unet": 0.5})
        np.testing.assert_array_equal(tiny.picture(pipe), everywhere)
        names = find_targets(pipe.unet, "attention-blocks")
        stack.weigh("prefix", {"up": 0.5, "down": 0.5, **({"mid": 0.5} if any("mid" in n for n in names) else {})})
        np.testing.assert_array_equal(tiny.picture(pipe), everywhere)
        drawn = [plain, everywhere]
        for weight in ({"up": 0.5}, {"*.attn1": 0.5}, {"down": Region(half, 0.5)}, Region(half, 0.5), "0@0,0.5@1"):
            stack.weigh("prefix", weight)
            drawn.append(tiny.picture(pipe))
            assert min(np.abs(drawn[-1] - other).max() for other in drawn[:-1]) > 1e-4, weight


def test_rows_are_not_reserved_where_there_are_none() -> None:
    pipe = tiny.sd()
    tree = repr(pipe.unet)
    with AdapterStack(pipe) as stack:
        for targets in ("attention-blocks", "norm"):
            with pytest.raises(TargetError, match=r"reserve: .* hold no rows; expected linear layers"):
                stack.reserve(8, targets)
        assert repr(pipe.unet) == tree
        stack.reserve(8, "attention")
        stack.add(prefixes(pipe, "unet"))


def test_it_cannot_be_fused_merged_or_baked_and_nothing_is_half_done(tmp_path: Path) -> None:
    pipe = tiny.sd()
    adapter = prefixes(pipe, "unet")
    before = fingerprint(pipe.unet)
    with AdapterStack(pipe) as stack:
        stack.add(adapter, 0.5)
        apart = tiny.picture(pipe)
        with pytest.raises(ConfigError, match="prefix"):
            stack.fuse()
        assert fingerprint(pipe.unet) == before
        np.testing.assert_array_equal(tiny.picture(pipe), apart)
    with pytest.raises(ConfigError, match="not linear"):
        merge([adapter], base=pipe)
    for compute in (merge, conflicts):  # without a base too, where one would not help
        with pytest.raises(ConfigError, match=r"attn1: method 'prefix' is not linear"):
            compute([adapter, adapter.renamed("b")])
    pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="prefix"):
        bake(tmp_path / "base", [(adapter, 1.0)], tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp32"])
def test_it_trains_from_a_configuration_and_is_drawn(tmp_path: Path, precision: str) -> None:
    given = settings(tmp_path, lr=3e-2, steps=3)
    given["backbone"]["precision"] = precision
    given["adapter"] |= {"method": "prefix", "targets": "attention-blocks", "ranks": {"*.attn1": 2}}
    result = train(TrainConfig.parse(given))
    assert result.adapter is not None
    assert result.backbone_unchanged
    adapter = load_adapter(result.adapter)
    assert (adapter.methods, adapter.spelling) == ({"prefix"}, "kohya")
    assert {layer.tensors["k"].shape[0] for *_, layer in adapter} == {2, 4}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain = tiny.picture(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        assert np.abs(tiny.picture(pipe) - plain).max() > 1e-3
    np.testing.assert_array_equal(tiny.picture(pipe), plain)


def test_its_targets_are_whole_attentions() -> None:
    unet = tiny.unet()
    layers = list(find_targets(unet, "attention-blocks").values())
    with attach(unet, Prefix(5), "*.attn2") as attachment:
        assert len(attachment.slots) == len(layers) // 2
    assert count_parameters("prefix", layers, 5) == sum(2 * 5 * layer.to_q.out_features for layer in layers)
    with pytest.raises(TargetError, match=r"'prefix' is not defined on .*to_q"):
        attach(unet, Prefix(5), "attention")
    with pytest.raises(TargetError, match=r"matches no linear"):
        find_targets(tiny.flux().transformer, "single_transformer_blocks.0.attn")
