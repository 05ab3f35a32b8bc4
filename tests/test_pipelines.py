"""Opening a pipeline: quantised while it is read, the same bytes as quantised afterwards, the family's layers kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora_diffusion.errors import ConfigError
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.quantize import fingerprint, is_quantized, quantize, weight_bytes
from tests import tiny, tiny_families

WATCH = """
import json, sys, threading, time
from lora_diffusion.pipelines import load_pipeline
from lora_diffusion.quantize import weight_bytes

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

load_pipeline(sys.argv[1], device="cpu")  # imports and whatever is made once
start = peak = held()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
opened = load_pipeline(sys.argv[2], device="cpu")
done = True
thread.join()
print(json.dumps([peak - start, weight_bytes(opened.pipe.transformer)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_memory_while_opening_stays_near_the_quantised_size(tmp_path: Path) -> None:
    """Allocated memory, not the pages of the file that the system keeps for itself."""
    pipe = tiny.flux()
    pipe.save_pretrained(tmp_path / "small")
    with torch.device("meta"):
        big = FluxTransformer2DModel.from_config(
            pipe.transformer.config | {"num_layers": 4, "num_attention_heads": 40, "num_single_layers": 2}
        )
    pipe.transformer = big.to_empty(device="cpu")
    for parameter in pipe.transformer.parameters():
        parameter.data.fill_(0.01)
    dense = weight_bytes(pipe.transformer)
    assert dense > 150e6
    pipe.save_pretrained(tmp_path / "big")
    command = [sys.executable, "-c", WATCH, str(tmp_path / "small"), str(tmp_path / "big")]
    # glibc would keep freed blocks of up to 32 MB for itself, by its mood
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, quantised = json.loads(said.splitlines()[-1])
    largest = max(p.numel() for p in pipe.transformer.parameters()) * 4
    assert quantised < dense / 4
    assert peak < quantised + 4 * largest + 16e6  # a layer as read, as float32, its bytes; the rest of the pipeline
    assert peak < dense / 2


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantised_while_read_is_quantised_afterwards(tmp_path: Path, precision: str) -> None:
    pipe = tiny.sd()
    pipe.save_pretrained(tmp_path)
    opened = load_pipeline(tmp_path, precision=precision, device="cpu")
    report = quantize(pipe.unet, precision, compute_dtype=torch.float32)
    assert opened.report == report
    assert fingerprint(opened.pipe.unet) == fingerprint(pipe.unet)
    assert not any(p.requires_grad or p.is_meta for p in opened.pipe.unet.parameters())


def test_a_family_s_own_layers_stay_in_16_bits(tmp_path: Path) -> None:
    for build, kept in ((tiny_families.chroma, "distilled_guidance_layer."), (tiny_families.flux2, "double_stream")):
        folder = tmp_path / kept
        build().save_pretrained(folder)
        model = load_pipeline(folder, device="cpu").pipe.transformer
        inside = [layer for name, layer in model.named_modules() if name.startswith(kept)]
        assert any(isinstance(layer, torch.nn.Linear) for layer in inside)
        assert not any(is_quantized(layer) for layer in inside)
        assert is_quantized(model.transformer_blocks[0].attn.to_q)


def test_a_folder_without_its_denoiser_is_one_sentence(tmp_path: Path) -> None:
    tiny.sd().save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no model weights"):
        load_pipeline(tmp_path, device="cpu")
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be opened"):
        load_pipeline(tmp_path, device="cpu")
