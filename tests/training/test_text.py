"""Adapters on text encoders and new tokens: trained, saved in one file, and the same where the file is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from lora_diffusion import AdapterStack, LoRA, LoraDiffusionError, TrainConfig, attach, load_adapter, train
from lora_diffusion.families import family_of
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.quantize import dequantize, is_quantized
from lora_diffusion.training.loop import Run
from lora_diffusion.training.preparation import prepare
from lora_diffusion.training.processes import Processes
from lora_diffusion.training.results import Progress
from tests import tiny
from tests.training.pictures import interrupted, settings

TOKEN = {"tokens": {"<kiki>": "cat"}, "token_vectors": 2, "token_lr": 0.5}


def given(root: Path, base: str = "sd", text: dict[str, Any] = TOKEN, **train_settings: Any) -> dict[str, Any]:
    made = settings(root, base, **train_settings)
    made["data"]["trigger"] = "<kiki>"
    return made | {"text": text}


@pytest.mark.parametrize(("base", "encoder"), [("sd", "text_encoder"), ("flux", "text_encoder_2")])
def test_a_text_encoder_learns_too_at_its_own_rate(tmp_path: Path, base: str, encoder: str) -> None:
    made = given(tmp_path, base, {"train": [encoder], "lr": 2e-2, "rank": 2}, steps=2, lr=1e-3)
    made["data"]["trigger"] = ""
    result = train(TrainConfig.parse(made))
    assert result.adapter is not None
    assert result.backbone_unchanged
    adapter = load_adapter(result.adapter)
    assert set(adapter.layers) == {encoder, "unet" if base == "sd" else "transformer"}
    ups = [layer.tensors["up"].abs().max().item() for layer in adapter.layers[encoder].values()]
    assert max(ups) == pytest.approx(4e-2, rel=0.05)  # AdamW moves by the rate a step
    assert {layer.tensors["down"].shape[0] for layer in adapter.layers[encoder].values()} == {2}
    pipe, peer = (DiffusionPipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    with AdapterStack(pipe) as stack:
        stack.add(result.adapter)
        ours = tiny.picture(pipe)
    if base == "sd":  # Diffusers puts nothing on a T5
        peer.load_lora_weights(result.adapter)
        np.testing.assert_allclose(ours, tiny.picture(peer), atol=1e-5)
    else:
        peer.load_lora_weights({k: v for k, v in adapter_tensors(result.adapter).items() if "transformer" in k})
        assert np.abs(ours - tiny.picture(peer)).max() > 1e-4


def adapter_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_new_tokens_are_in_the_file_and_mean_there_what_they_meant(tmp_path: Path) -> None:
    config = TrainConfig.parse(given(tmp_path, text=TOKEN | {"train": ["text_encoder"]}, steps=3))
    opened = load_pipeline(config.base, precision="fp32", device="cpu")
    family = family_of(opened.pipe)
    pristine = opened.pipe.text_encoder.get_input_embeddings().weight.clone()
    run = Run(config, opened, family, prepare(config, opened, family, lambda done, total: None), Processes("cpu"))
    prompt = ["a picture of <kiki>"]
    with torch.no_grad():
        before = family.encode_prompts(opened.pipe, prompt)["states"]
        heard: list[torch.Tensor] = []

        def listen(progress: Progress) -> None:
            if progress.stage == "measure" and progress.done == 1:
                heard.append(family.encode_prompts(opened.pipe, prompt)["states"])

        with torch.enable_grad():
            result = run.go(listen)
        (after,) = heard
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(opened.pipe.text_encoder.get_input_embeddings().weight, pristine)
    assert result.adapter is not None
    adapter = load_adapter(result.adapter)
    assert adapter.embeddings["<kiki>"]["text_encoder"].shape == (2, 32)
    pipe = load_pipeline(config.base, precision="fp32", device="cpu").pipe
    with AdapterStack(pipe) as stack, torch.no_grad():
        stack.add(adapter)
        torch.testing.assert_close(family.encode_prompts(pipe, prompt)["states"], after, rtol=1e-4, atol=1e-4)


def test_textual_inversion_trains_tokens_and_no_layer_and_diffusers_reads_the_file(tmp_path: Path) -> None:
    made = given(tmp_path, steps=2)
    made["adapter"]["targets"] = []
    result = train(TrainConfig.parse(made))
    assert result.adapter is not None
    assert result.backbone_unchanged
    assert result.heldout_adapter != result.heldout_base
    adapter = load_adapter(result.adapter)
    assert (len(adapter), adapter.spelling, set(adapter.embeddings)) == (0, "embedding", {"<kiki>"})
    pipe, peer = (DiffusionPipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    peer.load_textual_inversion(result.adapter)
    with AdapterStack(pipe) as stack:
        plain = tiny.picture(pipe, "a <kiki>")
        stack.add(adapter)
        ours = tiny.picture(pipe, "a <kiki>")
    np.testing.assert_allclose(ours, tiny.picture(peer, "a <kiki>"), atol=1e-5)
    assert np.abs(ours - plain).max() > 1e-4
    with pytest.raises(LoraDiffusionError, match=r"adapter\.targets is empty"):
        TrainConfig.parse(made | {"text": {}})


def test_interrupted_with_tokens_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    text = TOKEN | {"train": ["text_encoder"]}
    whole = given(tmp_path, text=text, steps=3, ema=0.5)
    expected = train(TrainConfig.parse(whole)).adapter
    broken = TrainConfig.parse(whole | {"output": str(tmp_path / "broken")})

    interrupted(broken)
    finished = train(broken).adapter
    assert finished is not None
    assert expected is not None
    assert finished.read_bytes() == expected.read_bytes()
    again = given(tmp_path, text=text, steps=1, lr=1e-12) | {"output": str(tmp_path / "again")}
    again["adapter"]["init_from"] = str(expected)
    again["text"] = again["text"] | {"lr": 1e-12, "token_lr": 1e-12}
    made = train(TrainConfig.parse(again)).adapter
    assert made is not None
    old, new = (load_adapter(path).embeddings["<kiki>"]["text_encoder"] for path in (expected, made))
    torch.testing.assert_close(old, new, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ({"train": ["text_encoder_2"]}, r"text\.train: there is no 'text_encoder_2' to train"),
        ({"tokens": {"<other>": "cat"}}, r"no caption holds '<other>'"),
        ({"tokens": {"<kiki>": ""}}, r"'' is no word to begin as"),
        ({"tokens": {"<kiki>": "cat"}, "token_vectors": 0}, r"text\.token_vectors = 0"),
        ({"train": ["text_encoder"], "targets": "atention"}, "did you mean 'attention'"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path: Path, text: dict[str, Any], match: str) -> None:
    with pytest.raises(LoraDiffusionError, match=match):
        train(TrainConfig.parse(given(tmp_path, text=text)))
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_text_encoders_say_what_their_weights_say_and_train(tmp_path: Path, precision: Any) -> None:
    tiny.flux().save_pretrained(tmp_path / "base")
    plain, packed = (
        load_pipeline(tmp_path / "base", precision="fp32", device="cpu", text_encoders=each).pipe
        for each in (None, precision)
    )
    linear = packed.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q
    assert linear.weight.dtype == (torch.int8 if precision == "int8" else torch.uint8)
    if precision == "nf4":
        assert packed.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    family = family_of(plain)
    with attach(packed.text_encoder_2, LoRA(2), "attention", component="text_encoder_2") as attachment:
        heard, meant = (family.encode_prompts(pipe, ["a red fox"]) for pipe in (packed, plain))
        heard["states"].square().sum().backward()
        assert all(p.grad is not None for name, p in attachment.named_parameters() if name.endswith(".up"))
    for name in ("text_encoder", "text_encoder_2"):  # what it says is what the quantised weights say
        for inner, layer in getattr(packed, name).named_modules():
            if is_quantized(layer):
                getattr(plain, name).get_submodule(inner).weight.data = dequantize(layer)
    exact = family.encode_prompts(plain, ["a red fox"])
    for name, states in exact.items():
        assert tiny.error(heard[name].detach(), states) < 1e-4
        assert tiny.error(states, meant[name]) > 1e-4
