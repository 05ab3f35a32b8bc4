"""Frozen backbones in 4 or 8 bits: what is quantised, what stays in 16 bits and what that costs.

    nf4    4-bit NormalFloat in blocks of 64 with doubly quantised constants: 4.13 bits a weight
           (Dettmers et al. 2023, QLoRA, arXiv:2305.14314), by bitsandbytes, on CPU and CUDA
    int8   one byte a weight, one scale a row, on any device
    bf16 / fp16 / fp32   only cast and frozen

The modules are walked here, layer by layer, so that memory never holds two copies of more than one layer
(diffusers' own `BitsAndBytesConfig` refuses to work without a GPU). `plan.py` says what stays in 16 bits,
`layers.py` is the only file that imports bitsandbytes, and does so when it is first needed.
"""

from lora_diffusion.quantize.contents import fingerprint, own_tensors, weight_bytes
from lora_diffusion.quantize.files import load_quantized, save_quantized, saved_as
from lora_diffusion.quantize.layers import dequantize, is_quantized
from lora_diffusion.quantize.plan import ADALN, Precision
from lora_diffusion.quantize.report import LayerCost, QuantizationReport
from lora_diffusion.quantize.streaming import WeightFiles, empty_encoder, empty_model, encoder_weights
from lora_diffusion.quantize.walk import quantize

__all__ = [
    "ADALN",
    "LayerCost",
    "Precision",
    "QuantizationReport",
    "WeightFiles",
    "dequantize",
    "empty_encoder",
    "empty_model",
    "encoder_weights",
    "fingerprint",
    "is_quantized",
    "load_quantized",
    "own_tensors",
    "quantize",
    "save_quantized",
    "saved_as",
    "weight_bytes",
]
