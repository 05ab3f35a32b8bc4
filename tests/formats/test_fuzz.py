"""Damaged files by the thousand: each is a clear error or a sound adapter, and no pipeline is left half loaded."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_diffusion import Adapter, AdapterFileError, AdapterStack, LoraDiffusionError, load_adapter, save_adapter
from lora_diffusion.formats import container
from tests import tiny
from tests.formats import random_adapters

SECONDS = 5.0  # a kind of damage; most machines reach COUNT first
COUNT = 1_500


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Sound files of several spellings."""
    folder = tmp_path_factory.mktemp("sound")
    adapter = random_adapters.over(tiny.sd(), "unet", "text_encoder")
    few = Adapter("few", {component: dict(list(of.items())[:6]) for component, of in adapter.layers.items()})
    paths = [save_adapter(few, folder / f"{name}.safetensors", format=name) for name in ("diffusers", "kohya", "comfy")]
    numbered = {f"unet:{i}:{part}": torch.ones(2, 2) for i in range(3) for part in ("up", "down")}
    container.write(folder / "numbered", numbered | {"<s1>": torch.ones(8)}, {"unet:0:rank": "2", "<s1>": "<embed>"})
    container.write(folder / "token", {"emb_params": torch.ones(2, 8)}, {})
    return [path.read_bytes() for path in [*paths, folder / "numbered", folder / "token"]]


def bytes_flipped(content: bytes, pick: random.Random) -> bytes:
    damaged = bytearray(content)
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(pick.choice((1, 2, 8))):
        damaged[pick.randrange(header if pick.random() < 0.8 else len(damaged))] = pick.randrange(256)
    return bytes(damaged)


def cut_or_spliced(content: bytes, pick: random.Random) -> bytes:
    start, stop = sorted(pick.randrange(len(content) + 1) for _ in range(2))
    return pick.choice(
        (content[:start], content[:start] + content[stop:], content[:stop] + content[start:], content[start:])
    )


ODD = (0, -1, 1, 2**31, 2**63, 10**30, 1.5, None, True, "x", [], {}, [[]], "\u0000", "../../x", "é" * 2000)
SUFFIXES = ("lora_up.weight", "alpha", "lora_A.weight", "hada_w1_a", "diff", "dora_scale", "on_input", "weight")


def header_edited(content: bytes, pick: random.Random) -> bytes:
    """Valid JSON that says something else: names, shapes, dtypes, ranges, metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for _ in range(pick.choice((1, 1, 3))):
        name = pick.choice(list(header) or ["__metadata__"])
        entry = header.get(name)
        if name == "__metadata__":
            known = entry if isinstance(entry, dict) else {}
            said = pick.choice(list(known) or ["lora_adapter_metadata"])
            header[name] = pick.choice((known | {said: pick.choice(ODD)}, known | {said: "{"}, pick.choice(ODD)))
            continue
        what = pick.choice(("name", "suffix", "shape", "dtype", "data_offsets", "drop", "swap"))
        if what == "drop":
            del header[name]
        elif what in ("name", "suffix"):
            stem = name.partition(".")[0] if what == "suffix" else pick.choice(("", "lora_unet_", "unet.", "../../"))
            header[f"{stem}.{pick.choice(SUFFIXES)}"] = header.pop(name)
        elif what == "swap" and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            entry["shape"] = entry["shape"][::-1] if pick.random() < 0.5 else [*entry["shape"], 1]
        elif isinstance(entry, dict):
            entry[what] = pick.choice((pick.choice(ODD), "F16", [0, 4], [2, 2], [pick.choice(ODD)]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize("damage", [bytes_flipped, cut_or_spliced, header_edited])
def test_a_damaged_file_is_an_error_or_a_sound_adapter(damage, files: list[bytes], tmp_path: Path):
    pick = random.Random(1)
    stop = time.monotonic() + SECONDS
    seen, longest = {"error": 0, "adapter": 0}, 0
    path = tmp_path / "a.safetensors"
    for number in range(COUNT):
        path.write_bytes(damage(files[number % len(files)], pick))
        for strict in (True, False):
            try:
                adapter = load_adapter(path, strict=strict)
            except AdapterFileError as error:
                seen["error"] += 1
                longest = max(longest, len(str(error)))
                continue
            seen["adapter"] += 1
            if strict:
                adapter.check()
                assert not adapter.unused
        if time.monotonic() > stop:
            break
    assert seen["error"] > 100
    assert longest < 2_000


def test_a_damaged_file_never_leaves_a_pipeline_half_loaded(tmp_path: Path):
    pipe = tiny.sd()
    sound = save_adapter(random_adapters.over(pipe, "unet", "text_encoder"), tmp_path / "a.safetensors", format="kohya")
    content, pick = sound.read_bytes(), random.Random(2)
    modules = {name: id(module) for name, module in tree(pipe)}
    stop = time.monotonic() + SECONDS
    loaded = failed = 0
    with AdapterStack(pipe) as stack:
        while time.monotonic() < stop and loaded + failed < 60:
            sound.write_bytes(header_edited(content, pick) if pick.random() < 0.9 else content)
            try:
                stack.add(sound, name="a")
            except LoraDiffusionError:
                failed += 1
            else:
                loaded += 1
                stack.remove("a")
            assert {name: id(module) for name, module in tree(pipe)} == modules
    assert failed
    assert loaded


def tree(pipe: object) -> list[tuple[str, nn.Module]]:
    return [
        (f"{component}.{name}", module)
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipe, component).named_modules()
    ]
