"""The metadata of what we write: true of the file, in the keys other tools read, and carried along only while true."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialise

from lora_diffusion import Adapter, LayerAdapter, load_adapter, save_adapter
from lora_diffusion.families.original import named_for
from lora_diffusion.formats.identity import tool_of
from lora_diffusion.formats.peft_folder import MODEL, save_peft_folder
from lora_diffusion.methods import new_method
from tests import tiny
from tests.formats import random_adapters

MUST = {"sai_model_spec", "architecture", "implementation", "title"}  # of the model specification 1.0.0


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def body(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def pair(width: int, name: str, component: str = "unet", method: str = "lora") -> Adapter:
    layer = LayerAdapter(method, {"down": torch.ones(4, width), "up": torch.ones(8, 4)}, 2.0)
    return Adapter("style", {component: {name: layer}})


XL = pair(2048, "mid_block.attentions.0.transformer_blocks.9.attn2.to_k")
FLUX = pair(3072, "single_transformer_blocks.0.attn.to_q", "transformer")


@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "comfy", "peft", "embedding"])
def test_the_hashes_are_those_of_the_bytes_behind_the_header(spelling: str, tmp_path: Path):
    adapter = Adapter("a", {}, {"<cat>": {"text_encoder": torch.randn(2, 768)}}) if spelling == "embedding" else XL
    adapter = replace(adapter, metadata={"sshs_model_hash": "0", "modelspec.hash_md5": "0x1", "sshs_legacy_hash": "2"})
    if spelling == "peft":
        path = save_peft_folder(adapter, tmp_path / "folder") / MODEL
    else:
        path = save_adapter(adapter, tmp_path / "a.safetensors", format=spelling, metadata={"modelspec.title": "x"})
    said, digest = metadata(path), hashlib.sha256(body(path.read_bytes())).hexdigest()
    assert said["sshs_model_hash"] == digest
    assert said["modelspec.hash_sha256"] == f"0x{digest}"
    assert digest == hashlib.sha256(body(serialise(load_file(path)))).hexdigest()  # sd-scripts writes it again to tell
    assert not {"modelspec.hash_md5", "sshs_legacy_hash"} & said.keys()


@pytest.mark.parametrize(
    ("adapter", "architecture", "base"),
    [
        (pair(768, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"), "stable-diffusion-v1/lora", "sd_v1"),
        (XL, "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        (FLUX, "flux-1-dev/lora", "flux1"),
        (
            Adapter("t", {}, {"<x>": {"text_encoder": torch.ones(1, 768), "text_encoder_2": torch.ones(1, 1280)}}),
            "stable-diffusion-xl-v1-base/textual-inversion",
            None,
        ),
    ],
)
def test_a_file_of_a_known_family_obeys_the_model_specification(
    adapter: Adapter, architecture: str, base: str | None, tmp_path: Path
):
    spelling = "kohya" if len(adapter) else "embedding"
    said = metadata(save_adapter(adapter, tmp_path / "a.safetensors", format=spelling))
    assert {f"modelspec.{key}" for key in MUST} <= said.keys()
    assert (said["modelspec.architecture"], said["modelspec.sai_model_spec"]) == (architecture, "1.0.0")
    assert said.get("ss_base_model_version") == base
    assert all(said.values())


@pytest.mark.parametrize("width", [1024, 32])  # Stable Diffusion 2 of which kind, the tensors do not tell
def test_a_file_of_an_unknown_architecture_does_not_claim_to_obey_it(width: int, tmp_path: Path):
    adapter = pair(width, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    said = metadata(save_adapter(adapter, tmp_path / "a.safetensors"))
    assert not {"modelspec.sai_model_spec", "modelspec.architecture"} & said.keys()
    assert said["modelspec.title"] == said["ss_output_name"] == "style"


def test_the_implementation_is_that_whose_names_the_file_has(tmp_path: Path):
    for build, repository in ((tiny.sdxl, "Stability-AI/generative-models"), (tiny.flux, "black-forest-labs/flux")):
        pipe = build()
        adapter = random_adapters.over(pipe, "unet" if hasattr(pipe, "unet") else "transformer")
        plain = save_adapter(adapter, tmp_path / "a.safetensors", overwrite=True)
        named = named_for(load_adapter(plain), "kohya", pipe.components)
        there = save_adapter(named, tmp_path / "b.safetensors", format="kohya", overwrite=True)
        back = named_for(load_adapter(there), "diffusers", pipe.components)
        again = save_adapter(back, tmp_path / "c.safetensors", overwrite=True)
        assert metadata(plain)["modelspec.implementation"] == metadata(again)["modelspec.implementation"] == "diffusers"
        assert metadata(there)["modelspec.implementation"] == f"https://github.com/{repository}"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("loha", {"algo": "loha"}), ("lokr", {"algo": "lokr"}), ("oft", {"algo": "diag-oft"}), ("lora", None)],
)
def test_the_network_is_what_sd_scripts_would_call_it(method: str, arguments: object, tmp_path: Path):
    layer = new_method(method).fresh(torch.nn.Linear(16, 16))
    said = metadata(save_adapter(Adapter("a", {"unet": {"mid_block.a": layer}}), tmp_path / "a.st", format="kohya"))
    assert said["ss_network_module"] == ("lycoris.kohya" if arguments else "networks.lora")
    assert json.loads(said.get("ss_network_args", "null")) == arguments
    assert "" not in said.values()


FOREIGN = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": '{"algo": "loha", "conv_dim": "4"}',
    "ss_network_dim": "64",
    "ss_base_model_version": "sd_1.5",
    "ss_tag_frequency": '{"10_kiki": {"kiki": 10}}',
    "ss_sd_model_hash": "abc",
    "ss_session_id": "1",
    "ss_output_name": "kiki",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.author": "someone",
    "modelspec.thumbnail": "data:image/jpeg;base64,00",
    "modelspec.hash_sha256": "0x00",
    "sshs_model_hash": "00",
}


def test_metadata_that_still_hold_are_kept_and_others_are_not(tmp_path: Path):
    path = tmp_path / "theirs.safetensors"
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 3072), f"{stem}.lora_up.weight": torch.ones(3072, 4)}
    save_file(tensors, path, metadata=FOREIGN)
    said = metadata(save_adapter(load_adapter(path), tmp_path / "a.safetensors", format="comfy"))
    kept = ("ss_tag_frequency", "ss_sd_model_hash", "ss_output_name", "modelspec.author", "modelspec.thumbnail")
    assert {key: said[key] for key in kept} == {key: FOREIGN[key] for key in kept}
    assert (said["ss_network_module"], said["ss_network_dim"]) == ("networks.lora_flux", "4")
    assert (said["ss_base_model_version"], said["modelspec.architecture"]) == ("flux1", "flux-1-dev/lora")
    assert "ss_network_args" not in said
    assert said["modelspec.hash_sha256"] != "0x00"
    assert tool_of(FOREIGN) == "LyCORIS in sd-scripts"
    assert tool_of(said) == "sd-scripts, then lora_diffusion"


def test_what_a_tool_says_more_closely_stands(tmp_path: Path):
    closer = {"modelspec.architecture": "flux-1-schnell/lora", "ss_base_model_version": "flux1-schnell"}
    closer |= {"ss_network_module": "networks.lora_flux", "ss_network_args": '{"train_blocks": "double"}'}
    said = metadata(save_adapter(replace(FLUX, metadata=closer), tmp_path / "a.safetensors"))
    assert {key: said[key] for key in closer} == closer


@pytest.mark.parametrize("text", ["[", "[]", "null", '"x"', "[" * 10_000, '{"algo": {}}'])
def test_damaged_arguments_of_a_network_are_no_error(text: str, tmp_path: Path):
    adapter = replace(XL, metadata={"ss_network_module": "lycoris.kohya", "ss_network_args": text})
    assert metadata(save_adapter(adapter, tmp_path / "a.safetensors"))["ss_network_module"]


def test_a_folder_of_a_changed_adapter_has_its_own_content_hash(tmp_path: Path):
    old = {"lora_diffusion.content_hash": "0", "lora_diffusion.version": "0.0.1", "ss_network_dim": "77"}
    folder = save_peft_folder(replace(XL, metadata=old), tmp_path / "folder")
    said = metadata(folder / MODEL)
    assert said["lora_diffusion.content_hash"] == XL.content_hash
    assert (said["ss_network_dim"], said["lora_diffusion.version"] == "0.0.1") == ("4", False)


def test_what_we_write_is_known_as_ours(tmp_path: Path):
    assert tool_of(metadata(save_adapter(XL, tmp_path / "a.safetensors", format="kohya"))) == "lora_diffusion"
