"""Tiny random Diffusers pipelines, built in code: seeded, offline, a fraction of a second each.

Layer names, block structure and pipeline classes are those of the real families; only the sizes are
small. Pictures are 32x32, latents 16x16. The same seed gives the same bytes.

    pipe = tiny.sd()
    image = tiny.picture(pipe)          # (1, 32, 32, 3) float32 array, two steps, fixed noise
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

PICTURE = 32  # pixels
LATENT = 16
WIDTH = 32  # of every text encoder

P = ParamSpec("P")
T = TypeVar("T")


def _seeded(build: Callable[P, T]) -> Callable[P, T]:
    """`build`, its weights drawn from `seed` (keyword, default 0); the global random state stays."""

    @wraps(build)
    def seeded(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(kwargs.pop("seed", 0)))  # type: ignore[call-overload]
            built = build(*args, **kwargs)
        for module in _modules(built):
            module.eval().requires_grad_(requires_grad=False)
        return built

    return seeded


def _modules(built: object) -> list[nn.Module]:
    parts = built.components.values() if isinstance(built, DiffusionPipeline) else [built]
    return [part for part in parts if isinstance(part, nn.Module)]


def picture(
    pipe: DiffusionPipeline, prompt: str | list[str] = "a red fox", *, steps: int = 2, **kwargs: Any
) -> np.ndarray:
    """What `pipe` draws from fixed noise: (batch, 32, 32, 3) float32 in 0..1."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    settings = {"height": PICTURE, "width": PICTURE, "num_inference_steps": steps, "output_type": "np"} | kwargs
    return pipe(prompt=prompt, generator=generator, **settings).images


def unet() -> UNet2DConditionModel:
    """The U-Net of `sd()` alone."""
    return sd().unet


def transformer() -> FluxTransformer2DModel:
    """The transformer of `flux()` alone."""
    return flux().transformer


def predict(model: nn.Module, dtype: torch.dtype) -> Tensor:
    """What a U-Net or FLUX transformer predicts for fixed random inputs of `dtype`."""
    random = torch.Generator().manual_seed(3)
    if isinstance(model, UNet2DConditionModel):
        x = torch.randn(2, 4, 16, 16, generator=random).to(dtype)
        return model(x, torch.tensor([10, 500]), torch.randn(2, 7, 32, generator=random).to(dtype)).sample
    return model(
        hidden_states=torch.randn(1, 16, 16, generator=random).to(dtype),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=random).to(dtype),
        pooled_projections=torch.randn(1, 32, generator=random).to(dtype),
        timestep=torch.tensor([0.5]).to(dtype),
        guidance=torch.tensor([3.5]).to(dtype),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def error(found: Tensor, true: Tensor) -> float:
    """Distance between two tensors over the length of the true one."""
    return ((found.float() - true.float()).norm() / true.float().norm()).item()


@_seeded
def sd(**unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: U-Net with cross-attention, one CLIP. Keywords change the U-Net's configuration."""
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=_unet(**unet),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@_seeded
def sdxl(**unet: Any) -> StableDiffusionXLPipeline:
    """SDXL: linear transformer projections, two CLIPs, size and crop conditioning."""
    config = {
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=_unet(**(config | unet)),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


@_seeded
def sd3(**transformer: Any) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: MM-DiT, two CLIPs and a T5, flow matching."""
    config = {
        "sample_size": LATENT,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 2 * WIDTH,
        "pooled_projection_dim": 2 * WIDTH,
        "out_channels": 4,
        "pos_embed_max_size": 16,
    }
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(config | transformer)),
        vae=_vae(4, shift=0.0609),
        text_encoder=clip(projection=True),
        text_encoder_2=clip(projection=True),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@_seeded
def flux(**transformer: Any) -> FluxPipeline:
    """FLUX.1: double and single stream blocks, guidance embedding, packed latents, flow matching."""
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**(config | transformer)),
        vae=_vae(4, shift=0.1159),
        text_encoder=clip(),
        text_encoder_2=t5(WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    )


def clip(*, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder, `WIDTH` wide."""
    config = CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu" if projection else "quick_gelu",
        bos_token_id=len(_clip_vocabulary()) - 2,
        eos_token_id=len(_clip_vocabulary()) - 1,
        pad_token_id=len(_clip_vocabulary()) - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(width: int) -> T5EncoderModel:
    """A two-layer T5 encoder, `width` wide, with gated feed-forwards as in T5 v1.1."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_vocabulary()),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer, one token a character: no download, every text is representable."""
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer over single characters with T5's special tokens."""
    return T5Tokenizer(vocab=_t5_vocabulary(), extra_ids=0, model_max_length=64)


def _unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": LATENT,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": (2, 4),
    }
    return UNet2DConditionModel(**(config | changes))


def _vae(channels: int, *, shift: float | None = None, stages: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(*(16,) * (stages - 1), 32),
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=PICTURE,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def _clip_vocabulary() -> dict[str, int]:
    letters = _byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _t5_vocabulary() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return [*special, *((chr(code), -3.0) for code in range(33, 127))]
