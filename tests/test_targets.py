"""Presets and globs find the layers that people mean."""

from __future__ import annotations

import pytest
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from lora_diffusion import LoRA, TargetError, attach
from lora_diffusion.targets import find_targets


def names(model: object, targets: str | list[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] if name[-1] != "0" else "to_out.0" for name in find_targets(model, targets)}


def test_presets_on_a_unet(sd: DiffusionPipeline) -> None:
    assert names(sd.unet, "attention") == {"to_q", "to_k", "to_v", "to_out.0"}
    assert names(sd.unet, "attention-qv") == {"to_q", "to_v"}
    assert names(sd.unet, "ff") == {"proj", "2"}
    assert {"conv1", "conv2", "conv_in", "conv_out"} <= names(sd.unet, "conv")
    everything = find_targets(sd.unet, "all-linear+conv")
    assert everything.keys() == find_targets(sd.unet, ["all-linear", "conv"]).keys()
    assert len(everything) == len(find_targets(sd.unet, "all-linear")) + len(find_targets(sd.unet, "conv"))


def test_presets_on_joint_attention(flux: DiffusionPipeline, sd3: DiffusionPipeline) -> None:
    for model in (flux.transformer, sd3.transformer):
        assert {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"} <= names(
            model, "attention"
        )
    assert {"proj_mlp", "proj_out"} <= names(flux.transformer, "ff")
    assert "proj_out" not in find_targets(flux.transformer, "ff")  # the model's own last layer


def test_presets_on_text_encoders(flux: DiffusionPipeline) -> None:
    assert names(flux.text_encoder, "attention") == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert names(flux.text_encoder, "ff") == {"fc1", "fc2"}
    assert names(flux.text_encoder_2, "attention") == {"q", "k", "v", "o"}
    assert names(flux.text_encoder_2, "ff") >= {"wo"}


def test_globs(sd: DiffusionPipeline) -> None:
    found = find_targets(sd.unet, "mid_block.*.attn2.to_[kv]")
    assert found
    assert all(name.startswith("mid_block.") and name[-1] in "kv" for name in found)


def test_norms_are_found_by_their_preset_or_a_glob_that_matches_them_alone(sd: DiffusionPipeline) -> None:
    norms = find_targets(sd.unet, "norm")
    assert {type(layer) for layer in norms.values()} == {nn.LayerNorm, nn.GroupNorm}
    assert "conv_norm_out" in norms
    assert find_targets(sd.unet, "mid_block.*.norm?").keys() < norms.keys()
    assert not find_targets(sd.unet, "mid_block.*").keys() & norms.keys()
    everything = find_targets(sd.unet, "all-linear+conv+norm")
    assert len(everything) == len(find_targets(sd.unet, "all-linear+conv")) + len(norms)
    with pytest.raises(TargetError, match="'lora' is not defined on 'down_blocks"):
        attach(sd.unet, LoRA(2), "norm")


@pytest.mark.parametrize("target", ["atention", "up_blocks.*.to_w", ["attention", "nothing.*"], ""])
def test_unmatched_targets_are_errors(sd: DiffusionPipeline, target: str | list[str]) -> None:
    with pytest.raises(TargetError):
        find_targets(sd.unet, target)


def test_near_names_are_offered(sd: DiffusionPipeline) -> None:
    with pytest.raises(TargetError, match="did you mean 'attention'"):
        find_targets(sd.unet, "atention")


def test_attaching_twice_is_refused_and_changes_nothing(sd: DiffusionPipeline) -> None:
    with attach(sd.unet, LoRA(2), "attention") as first:
        tree = str(sd.unet)
        with pytest.raises(TargetError, match="already"):
            attach(sd.unet, LoRA(2), "all-linear")
        assert str(sd.unet) == tree
        assert len(first.slots) == len(find_targets(sd.unet, "attention"))


def test_a_preset_of_which_a_model_has_nothing_is_not_offered_again() -> None:
    with pytest.raises(TargetError, match=r"target 'conv' matches no .* there are presets") as caught:
        find_targets(nn.ModuleDict({"to_q": nn.Linear(4, 4)}), "all-linear+conv")
    assert "did you mean" not in str(caught.value)


def test_a_layer_that_peft_has_wrapped_is_one_target(sd: DiffusionPipeline) -> None:
    bare = set(find_targets(sd.unet, "all-linear"))
    sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    assert set(find_targets(sd.unet, "all-linear")) == bare  # neither PEFT's pair nor the layer inside, once more
    sd.unet.delete_adapters("default")  # its wrappers stay
    assert set(find_targets(sd.unet, "all-linear")) == bare
    with attach(sd.unet, LoRA(2), "all-linear") as attached:
        assert set(attached.adapter("a").layers["unet"]) == bare
