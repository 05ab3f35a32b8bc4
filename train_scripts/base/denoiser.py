"""The base model's parts beside the VAE: tokenizer, text encoder, U-Net and noise schedule.

Every part is a stock Diffusers or Transformers class, so that `StableDiffusionPipeline.from_pretrained`
opens the result. The pooled text also enters the time embedding and every residual block is scaled
and shifted by it (FiLM, as SDXL does with its pooled text): 1.3-1.4 times fewer samples to the same loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TOKENS = 24  # model_max_length: the longest caption has 17
VOCABULARY = 4000
STEPS, GUIDANCE = 20, 1.3  # the gate's, and the contact sheet's: more guidance widens the latents, and colours drift
WIDTH = 128  # of the text encoder, and so of the cross-attention


def train_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from `captions`; no text is unknown to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [BOS, EOS, *alphabet, *(byte + "</w>" for byte in alphabet)]
    blank = CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    backend = blank.backend_tokenizer
    backend.model = BPE(end_of_word_suffix="</w>")
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    merges = _merges(backend.to_str())
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys([*symbols, *(a + b for a, b in merges)]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 128, trained together with the U-Net: 0.9 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """4.3 M parameters; attention at 8x8 only (at 16x16 it would halve the speed)."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to zero signal (arXiv:2305.08891): backgrounds come out a clean white."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # without meaning for trailing steps, but Diffusers warns at 0
        set_alpha_to_one=True,
    )


def build_denoiser(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """U-Net and text encoder as one module, under the names of the pipeline's components.

    The U-Net trains with the plain attention: the backward pass of torch's fused one takes 30 % of a step on a CPU.
    """
    unet = build_unet()
    unet.set_attn_processor(AttnProcessor())
    return nn.ModuleDict({"unet": unet, "text_encoder": build_text_encoder(tokenizer)})


def digest(work: Path) -> str:
    """12 hex digits of `WORK/denoiser.state`: what is made with one denoiser is kept under its name."""
    with (work / "denoiser.state").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def open_pipeline(work: Path) -> StableDiffusionPipeline:
    """A pipeline from the moving average in `WORK/denoiser.state` and from `WORK/vae`, in fp32 and eval mode."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    parts = build_denoiser(tokenizer)
    state = torch.load(work / "denoiser.state", weights_only=True, map_location="cpu")
    parts.load_state_dict(state["average"])
    parts["unet"].set_default_attn_processor()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=parts["text_encoder"].eval(),
        tokenizer=tokenizer,
        unet=parts["unet"].eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _merges(tokenizer_json: str) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer_json)["model"]["merges"]
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
