"""What NF4 leaves in 16 bits, family by family, at the denoisers' true shapes: GiB by reason. Nothing is computed.

    python benchmarks/kept.py                        # a table as in docs/families.md; also kept.json beside itself

The models are built on the meta device from Diffusers' own default configurations, or with the settings below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from stacking import SD15, SDXL

from lora_diffusion.families import FAMILIES
from lora_diffusion.quantize import QuantizationReport, quantize

SIGMA = {"caption_channels": 4096, "sample_size": 128}
SD35 = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
#: what it is called -> family, class, settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SD 1.5": ("sd", "UNet2DConditionModel", SD15),
    "SDXL": ("sdxl", "UNet2DConditionModel", SDXL),
    "SD 3.5 large": ("sd3", "SD3Transformer2DModel", SD35),
    "FLUX.1 dev": ("flux", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.2 dev": ("flux2", "Flux2Transformer2DModel", {}),
    "Z-Image": ("z-image", "ZImageTransformer2DModel", {}),
    "Qwen-Image": ("qwen-image", "QwenImageTransformer2DModel", {}),
    "Chroma": ("chroma", "ChromaTransformer2DModel", {}),
    "Lumina 2": ("lumina2", "Lumina2Transformer2DModel", {}),
    "Sana 1.6B": ("sana", "SanaTransformer2DModel", {}),
    "PixArt-Σ": ("pixart-sigma", "PixArtTransformer2DModel", SIGMA),
}
COLUMNS = ("embedder", "output projection", "convolution", "kept on request")


def measure(family: str, kind: str, settings: dict[str, Any]) -> dict[str, float]:
    """GiB in all, in 4 bits, kept by reason, and what keeping the timestep modulation would add."""
    reports: list[QuantizationReport] = []
    for keep_adaln in (False, True):
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**settings).to(torch.bfloat16)
        told: dict[str, Any] = {"compute_dtype": torch.bfloat16, "device": "meta", "keep": FAMILIES[family].kept}
        reports.append(quantize(model, "nf4", keep_adaln=keep_adaln, **told))
    report, size = reports[0], 2**30
    kept = {c: sum(one.bytes for one in report.kept if one.reason.startswith(c)) / size for c in COLUMNS}
    kept["other"] = sum(one.bytes for one in report.kept) / size - sum(kept.values())
    quantised = sum(one.bytes for one in report.quantized) / size
    adaln = (reports[1].bytes - report.bytes) / size
    return {"16 bits": 2 * report.parameters / size, "quantised": quantised, **kept, "keep_adaln adds": adaln}


def main() -> None:
    """Every family, as a table and as JSON."""
    found = {name: measure(*of) for name, of in MODELS.items()}
    titles = ["denoiser, GiB", *next(iter(found.values()))]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, row in found.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
