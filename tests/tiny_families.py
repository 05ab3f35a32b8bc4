"""Tiny random pipelines of the families that `tests.tiny` has no room for: same rules, same sizes.

pipe = tiny_families.qwen_image()
image = tiny_families.drawn(pipe)          # (1, 32, 32, 3) float32 array, two steps, no guidance
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.tiny import WIDTH, _byte_letters, _seeded, _vae, flux, picture, sd, sd3, t5, t5_tokenizer

_UNGUIDED = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "use_resolution_binning": False}
_LANGUAGE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
}


def drawn(pipe: DiffusionPipeline, prompt: str = "a red fox", *, steps: int = 2, **changes: Any) -> np.ndarray:
    """What `pipe` draws without guidance: (1, 32, 32, 3) float32 in 0..1."""
    known = inspect.signature(type(pipe).__call__).parameters
    unguided = {name: value for name, value in _UNGUIDED.items() if name in known}
    if isinstance(pipe, QwenImagePipeline):
        del unguided["guidance_scale"]
    if isinstance(pipe, ZImagePipeline):
        unguided["guidance_scale"] = 0.0  # there 1.0 is guided
    return picture(pipe, prompt, steps=steps, **(unguided | changes))


def sd2_v() -> StableDiffusionPipeline:
    """Stable Diffusion 2.x: linear projections, v prediction."""
    pipe = sd(use_linear_projection=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def sd35() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium: a second attention over the picture in some blocks, normalised queries and keys."""
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def schnell() -> FluxPipeline:
    """FLUX.1 schnell: no guidance embedding, no shift by size."""
    pipe = flux(guidance_embeds=False)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipe


@_seeded
def flux2() -> Flux2KleinPipeline:
    """FLUX.2 klein: Qwen3, patched latents behind a batch normalisation."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    encoder = Qwen3ForCausalLM(Qwen3Config(**(_LANGUAGE | {"num_hidden_layers": 28})))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, vae, encoder, _qwen_tokenizer(), transformer)


@_seeded
def z_image() -> ZImagePipeline:
    """Z-Image: Qwen3, refiners, reversed time."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 64, 64],
    )
    encoder = Qwen3Model(Qwen3Config(**_LANGUAGE))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, _vae(4, shift=0.1159), encoder, _qwen_tokenizer(), transformer)


@_seeded
def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: Qwen2.5-VL, a video VAE with a mean and a deviation a channel, packed latents."""
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 2.0],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    text = _LANGUAGE | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)
    return QwenImagePipeline(scheduler, vae, encoder, _qwen_tokenizer(), transformer)


@_seeded
def chroma() -> ChromaPipeline:
    """Chroma: FLUX blocks, modulation from one small network, a masked T5."""
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=64,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return ChromaPipeline(scheduler, _vae(4, shift=0.1159), t5(WIDTH), t5_tokenizer(), transformer)


@_seeded
def lumina2() -> Lumina2Pipeline:
    """Lumina Image 2: Gemma 2, refiners, reversed time."""
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )
    vae = _vae(4, shift=0.1159, stages=4)  # the pipeline takes it for granted that latents are 8 times smaller
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(transformer, scheduler, vae, _gemma(), _gemma_tokenizer())


@_seeded
def sana() -> SanaPipeline:
    """Sana: Gemma 2, linear attention, an autoencoder without posterior, a flow in a DPM solver."""
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=16,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(_gemma_tokenizer(), _gemma(), vae, transformer, scheduler)


@_seeded
def pixart() -> PixArtSigmaPipeline:
    """PixArt-Σ: T5, noise and variance answered side by side, a DPM solver."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=16,
        use_additional_conditions=False,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtSigmaPipeline(t5_tokenizer(), t5(WIDTH), _vae(4), transformer, scheduler)


def _gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**_LANGUAGE))


def _gemma_tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    vocabulary = [*special, *(chr(code) for code in range(33, 127))]
    return GemmaTokenizer(vocab={piece: number for number, piece in enumerate(vocabulary)})


def _qwen_tokenizer() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*_byte_letters(), *special])}
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=template)
