"""What every registered format must keep: `load(*dump(a)) == a`, nothing invented, nothing dropped."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_diffusion import Adapter, TargetError, save_adapter
from lora_diffusion.formats import FORMATS
from tests.formats import random_adapters

WRITERS = [name for name in FORMATS if FORMATS[name].writes and name != "embedding"]


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_dumped_is_recognised_and_loads_the_same(name: str, sd: StableDiffusionPipeline):
    adapter = random_adapters.over(sd, "unet", "text_encoder")
    tensors, metadata = FORMATS[name].dump(adapter)
    assert next(other.name for other in FORMATS.values() if other.recognises(tensors, metadata)) == name
    parsed = FORMATS[name].load(tensors, metadata)
    assert not parsed.unused
    assert Adapter("again", parsed.layers, parsed.embeddings) == adapter


@pytest.mark.parametrize("name", WRITERS)
def test_an_unknown_tensor_is_reported(name: str, sd: StableDiffusionPipeline):
    tensors, metadata = FORMATS[name].dump(random_adapters.over(sd, "unet"))
    parsed = FORMATS[name].load({**tensors, "../../etc/passwd": torch.ones(1)}, metadata)
    assert list(parsed.unused) == ["../../etc/passwd"]


def test_an_unknown_format_is_answered_with_the_known_ones(sd: StableDiffusionPipeline, tmp_path):
    with pytest.raises(TargetError, match="did you mean 'kohya'"):
        save_adapter(random_adapters.over(sd, "unet"), tmp_path / "a.safetensors", format="kohyas")
