"""Write the base model as a Diffusers folder in fp16: what ships in `samples/base/`.

    python train_scripts/base/export.py --work ~/base-work [--out samples/base]

Takes the moving average of `WORK/denoiser.state`, whatever its sample count, with `WORK/vae` and
`WORK/tokenizer`. Refuses to write more than 16 MB. The model card is `card.py`'s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from denoiser import GUIDANCE, open_pipeline
from diffusers import StableDiffusionPipeline

LIMIT = 16_000_000  # bytes, all parts together
SHIPPED = Path(__file__).parents[2] / "samples" / "base"


def export(work: Path, out: Path) -> int:
    """Write the pipeline to `out`, its weights in fp16; returns the bytes written."""
    pipeline = open_pipeline(work)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.half()
    with tempfile.TemporaryDirectory() as draft:
        pipeline.save_pretrained(draft)
        _load_in_float32(Path(draft) / "text_encoder" / "config.json")
        _forget_where_from(Path(draft))
        size = sum(file.stat().st_size for file in Path(draft).rglob("*") if file.is_file())
        if size > LIMIT:
            raise SystemExit(
                f"{work}: the pipeline takes {size / 1e6:.1f} MB, and at most {LIMIT / 1e6:.0f} MB may ship"
            )
        shutil.copytree(draft, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return size


def _load_in_float32(config: Path) -> None:
    """Transformers loads in the dtype its config names, Diffusers in float32: name that, so that the parts agree."""
    config.write_text(
        json.dumps(json.loads(config.read_text("utf-8")) | {"dtype": "float32"}, indent=2) + "\n", "utf-8"
    )


def _forget_where_from(draft: Path) -> None:
    """Configurations name the folder their part was loaded from, which is nobody else's business."""
    for config in draft.glob("*/config.json"):
        said = json.loads(config.read_text("utf-8"))
        said.pop("_name_or_path", None)
        config.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


@torch.no_grad()
def check(out: Path) -> None:
    """Open the folder with stock Diffusers and draw one picture."""
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("red apple", num_inference_steps=4, guidance_scale=GUIDANCE).images[0]
    if picture.size != (64, 64):
        raise SystemExit(f"{out}: drew {picture.size}, expected (64, 64)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    size = export(args.work, args.out)
    check(args.out)
    print(f"{args.out}: {size / 1e6:.2f} MB, opens and draws")


if __name__ == "__main__":
    main()
