"""Regions at the terminal and in prompts: the same bits as in Python, in the recipe whole, from the library alone."""

from __future__ import annotations

import io
import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_diffusion import AdapterStack, Region, load_adapter, save_adapter
from lora_diffusion.axes import Choices, grid_order, parse_factors
from lora_diffusion.errors import ConfigError, TargetError
from lora_diffusion.gates import parse_weight, read_weight, show_weight, spell_weight, times
from lora_diffusion.gates.masks import mask_again, write_mask
from lora_diffusion.generating import RECIPE, Drawing, Order, draw_order, read_recipe
from lora_diffusion.library import Library, by_image, parse_prompt, parse_prompts
from tests import tiny
from tests.test_gates import HALF, adapter
from tests.test_generating import run

FEW = ("--steps", 2, "--size", "32x32", "--guidance", 2)


def picture(folder: Path, name: str = "left.png", half: np.ndarray = HALF) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((half * 255).astype(np.uint8)).save(path)
    return path


def packed(region: Region) -> tuple[str, str]:
    """(hash of the pixels, the mask as a recipe holds it)."""
    masks: dict[str, str] = {}
    key = write_mask(region, masks)
    return key, masks[key]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def shelf(sd: Any, tmp_path: Path) -> Path:
    """A base model, and a library of an adapter and a mask."""
    sd.save_pretrained(tmp_path / "base")
    (tmp_path / "loras").mkdir()
    save_adapter(adapter(sd, "ink"), tmp_path / "loras" / "ink.safetensors")
    picture(tmp_path / "loras")
    return tmp_path


def test_a_mask_is_one_more_part_of_any_weight(tmp_path: Path) -> None:
    left = picture(tmp_path)
    for text, inside in (
        (f"0.8:mask={left}", 0.8),
        (f"mask={left}:0@0,1@0.5", "0@0,1@0.5"),
        (f"te=0.5:mask={left}:unet=-1", {"te": 0.5, "unet": -1.0}),
        (f"mask={left}", 1.0),
    ):
        assert parse_weight(text) == Region(torch.tensor(HALF), inside)
        assert parse_weight(text) != Region(torch.tensor(HALF), 0.3)
        assert parse_weight(text) != Region(torch.tensor(1 - HALF), inside)
    windows: list[str] = []
    assert parse_weight(r"0.3:mask=C:\masks\left.png", lambda name: windows.append(name) or left) == Region(HALF, 0.3)
    assert windows == [r"C:\masks\left.png"]
    said = dict.fromkeys(("0.8:mask=", f"mask={left}:mask={left}", f"0.8:te=1:mask={left}", f"x:mask={left}"), "weight")
    for bad, why in {**said, "0.8:mask=a:b.png": "mask's name, here 'a', and 'b.png' is no weight; rename"}.items():
        with pytest.raises(ConfigError, match=why):
            parse_weight(bad)
    (tmp_path / "text.png").write_text("no picture")
    for gone in ("none.png", "text.png"):
        with pytest.raises(ConfigError, match=gone):
            parse_weight(f"0.8:mask={tmp_path / gone}")


def test_a_mask_of_any_kind_is_read_as_it_looks(tmp_path: Path) -> None:
    half = (HALF * 255).astype(np.uint8)
    white = np.full((*HALF.shape, 4), 255, np.uint8)
    quarter = HALF.astype(np.uint16) * 0x4040
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees
    kinds: dict[str, tuple[Image.Image, np.ndarray]] = {
        "transparent.png": (Image.fromarray(np.dstack([white[..., :3], half])), HALF),
        "opaque.png": (Image.fromarray(np.dstack([half] * 3 + [white[..., 3]])), HALF),
        "grey.webp": (Image.fromarray(np.dstack([white[..., 0], half]), "LA"), HALF),
        "deep.png": (Image.fromarray(quarter), HALF * np.float32(64 / 255)),
        "deeper.tiff": (Image.fromarray(quarter.astype(np.int32)), HALF * np.float32(64 / 255)),
        "floats.tiff": (Image.fromarray(HALF * np.float32(0.3)), HALF * np.float32(0.3)),
        "bits.png": (Image.fromarray(half).convert("1"), HALF),
        "palette.png": (Image.fromarray(half).convert("P"), HALF),
        "one.png": (Image.new("L", (1, 1), 255), np.ones((1, 1), np.float32)),
    }
    for name, (drawn, expected) in kinds.items():
        drawn.save(tmp_path / name, lossless=True)
        assert np.array_equal(Region(tmp_path / name).pixels.numpy(), expected), name
    assert mask_again(*packed(Region(tmp_path / "deep.png"))).getpixel((0, 0)) == 64
    Image.fromarray(half).save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(Region(tmp_path / "turned.png").pixels.numpy(), np.rot90(HALF, -1))
    for nothing in (None, b"x", object()):
        with pytest.raises(ConfigError, match="expected a picture, its path or an array"):
            Region(nothing)


def test_a_rectangle_is_the_mask_of_its_pixels() -> None:
    for text, rows, columns in (
        ("0-0.5,0-1", slice(0, 8), slice(0, 4)),
        ("0.25-1,.5-.75", slice(4, 6), slice(2, 8)),
        ("0-1,0-1", slice(0, 8), slice(0, 8)),
    ):
        drawn = torch.zeros(8, 8)
        drawn[rows, columns] = 1
        assert torch.equal(Region(text).tokens((8, 8)), drawn.flatten())
        assert parse_weight(f"0.3:mask={text}") == Region(text, 0.3)
    assert Region("0-1,0-1").uniform() == 1
    assert Region("0-0.3333,0.1-0.77").mean == pytest.approx(0.3333 * 0.67, abs=1e-6)  # between pixels too
    for bad in ("0.5-0.5,0-1", "0.6-0.5,0-1", "0-1.5,0-1", "0-1,0.2-1.01"):
        with pytest.raises(ConfigError, match="rising shares"):
            parse_weight(f"1:mask={bad}")


def test_a_mask_in_a_prompt_is_a_picture_of_the_library_alone(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    picture(folder)
    picture(folder, "a/both.png")
    picture(folder, "b/both.png", 1 - HALF)
    secret = picture(tmp_path, "secret.png")
    (folder / "link.png").symlink_to(secret)
    library = Library(folder)
    assert parse_prompt("x <lora:ink:0.8:mask=left.png>", library) == ("x", {"ink": Region(HALF, 0.8)})
    assert parse_prompt("<lora:ink:mask=b/both.png>", library)[1] == {"ink": Region(1 - HALF)}
    with pytest.raises(TargetError, match=r"could be 'a/both.png', 'b/both.png'"):
        library.mask("both.png")
    with pytest.raises(TargetError, match=r"did you mean 'left.png'"):
        library.mask("left")
    for outside in ("../secret.png", str(secret), "link.png", "a/../left.png", "secret.png"):
        with pytest.raises(TargetError, match="no mask"):
            parse_prompt(f"<lora:ink:mask={outside}>", library)
    for part in ("unet=mask=", "te=1:up.0=mask=", "mask=left.png:unet=mask="):
        with pytest.raises(TargetError, match="no mask"):
            parse_prompt(f"<lora:ink:{part}{secret}>", library)
    assert parse_prompt("<lora:ink:te=1:unet=mask=left.png>", library)[1] == {"ink": {"te": 1.0, "unet": Region(HALF)}}
    with pytest.raises(ConfigError, match="there is none"):
        parse_prompt(f"<lora:ink:mask={secret}>")
    with pytest.raises(ConfigError, match="there is none"):
        parse_prompt(f"<lora:ink:unet=mask={secret}>")
    assert parse_prompt("<lora:ink:0.5:mask=0-0.5,0-1>")[1] == {"ink": Region("0-0.5,0-1", 0.5)}
    _, mixes = parse_prompts(["x <lora:ink:mask=left.png>", "y <lora:ink:mask=left.png>"], library)
    assert by_image(mixes) == {"ink": Region(HALF)}  # one region, not one an image


def test_a_region_is_written_down_whole_and_once() -> None:
    masks: dict[str, str] = {}
    soft = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    weight = {"unet": Region(soft, "0@0,1@1"), "te": Region("0-0.5,0-1", 0.2), "mid": Region(soft)}
    said = json.loads(json.dumps([spell_weight(weight, masks), 0.5]))
    assert len(masks) == 1
    assert read_weight(said, masks) == [weight, 0.5]
    with pytest.raises(ConfigError, match="is not there"):
        read_weight(said, {})
    with pytest.raises(ConfigError, match="not those"):
        read_weight(said, dict.fromkeys(masks, packed(Region(HALF))[1]))
    with pytest.raises(ConfigError, match="8 bits"):
        packed(Region(torch.full((2, 2), 0.3)))
    noise = torch.randint(0, 256, (1100, 1100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="at most 1 MiB"):
        packed(Region(noise))
    with pytest.raises(ConfigError, match="cannot be written down"):
        spell_weight(Region(HALF))
    key, text = packed(Region(soft))
    data = b64decode(text)
    for broken in (data[:20], data[:-30], b"", data[:45] + b"\x00\x01" + data[47:]):
        with pytest.raises(ConfigError, match=key[:12]):
            mask_again(key, b64encode(broken).decode())
    with pytest.raises(ConfigError, match=key[:12]):
        mask_again(key, "no base64")
    huge = io.BytesIO()
    Image.new("L", (2**13, 9000)).save(huge, "PNG")
    with pytest.raises(ConfigError, match="too many"):
        mask_again(key, b64encode(huge.getvalue()).decode())


def test_weights_are_shown_and_multiplied_as_they_are_spelled() -> None:
    for text in ("0.8:mask=0-0.5,0-1", "unet=1.0:te=0@0,1@0.5:mask=0-1,0-0.5", "0.5"):
        assert show_weight(parse_weight(text)) == text
    assert times(Region(HALF, {"unet": 2.0}), 0.5) == Region(HALF, {"unet": 1.0})
    with pytest.raises(ConfigError, match="--weights"):
        parse_factors("1:mask=0-0.5,0-1;0@0,1@1")
    order = grid_order(Choices(["p"], [0], {"a": Region(HALF, 0.8)}, [0, 0.5, "0@0,1@1"]), "weight", "seed")
    assert order.weights["a"] == [Region(HALF, 0.0), Region(HALF, 0.4), Region(HALF, "0.0@0.0,0.8@1.0")]


def test_at_the_terminal_and_in_a_prompt_a_mask_gives_the_pixels_that_it_gives_in_python(shelf: Path) -> None:
    ink, left = shelf / "loras" / "ink.safetensors", shelf / "loras" / "left.png"
    draw = ("-b", shelf / "base", *FEW)
    run("generate", "a fox", "-a", f"{ink}:unet=3:te=1:mask={left}", "-o", shelf / "option.png", *draw)
    tag = "a fox <lora:ink:unet=3:te=1:mask=left.png>"
    run("generate", tag, "-l", shelf / "loras", "-o", shelf / "tag.png", *draw)
    run("generate", "a fox", "-a", f"{ink}:unet=3:te=1:mask=0-0.5,0-1", "-o", shelf / "rectangle.png", *draw)
    run("generate", "a fox", "-a", f"{ink}:unet=3:te=1", "-o", shelf / "whole.png", *draw)
    pipe = tiny.sd().from_pretrained(shelf / "base", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    how = Drawing(2, 2.0, (32, 32))
    with AdapterStack(pipe) as stack:
        stack.add(load_adapter(ink), name="ink")
        weights = {"ink": [Region(HALF, {"unet": 3.0, "te": 1.0})]}
        ((here, _),) = draw_order(pipe, stack, Order(["a fox"], [0], weights), how, "base", None)
    for name in ("option", "tag", "rectangle"):
        assert np.array_equal(pixels(shelf / f"{name}.png"), np.asarray(here))
    assert not np.array_equal(pixels(shelf / "whole.png"), np.asarray(here))


def test_from_a_picture_alone_the_same_pixels_without_its_masks(shelf: Path) -> None:
    ink, mask = shelf / "loras" / "ink.safetensors", picture(shelf, "soft.png", HALF * 0.7)
    draw = ("-b", shelf / "base", *FEW, "-l", shelf / "loras", "-o", shelf / "x.png", "-n", 2)
    prompts = ["a fox", "a cat <lora:ink:0.5:mask=left.png>"]
    run("generate", *prompts, "-a", f"{ink}:3:mask={mask}", *draw, fails=TargetError)  # one name for two adapters
    ink.rename(shelf / "loras" / "other.safetensors")
    run("generate", *prompts[:1], "-a", f"{shelf / 'loras' / 'other.safetensors'}:3:mask={mask}", *draw)
    made = read_recipe(shelf / "x-2.png")
    assert made.order.weights["other"] == [Region(str(mask), 3.0)] * 2
    mask.unlink()
    (shelf / "loras" / "left.png").unlink()
    run("generate", "--from", shelf / "x-2.png", "-o", shelf / "again.png")
    assert np.array_equal(pixels(shelf / "x-2.png"), pixels(shelf / "again.png"))
    text = Image.open(shelf / "x-2.png").text[RECIPE]  # type: ignore[attr-defined]
    said = json.loads(text)
    assert len(said["masks"]) == 1
    said["masks"] = dict.fromkeys(said["masks"], packed(Region(HALF))[1])
    info = PngInfo()
    info.add_text(RECIPE, json.dumps(said))
    Image.open(shelf / "x-2.png").save(shelf / "turned.png", pnginfo=info)
    assert "not those" in run("generate", "--from", shelf / "turned.png", "-o", shelf / "no.png", fails=ConfigError)
    info.add_text(RECIPE, text.replace('"steps": 2', '"steps": Infinity'))
    Image.open(shelf / "x-2.png").save(shelf / "endless.png", pnginfo=info)
    with pytest.raises(ConfigError, match="not whole"):
        read_recipe(shelf / "endless.png")


def test_a_mask_that_a_recipe_cannot_hold_is_refused_before_anything_is_drawn(sd: Any) -> None:
    with AdapterStack(sd) as stack:
        stack.add(adapter(sd))
        calls: list[object] = []
        hook = sd.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        order = Order(["x"] * 9, list(range(9)), {"a": [1.0] * 8 + [Region(torch.full((4, 4), 0.3))]})
        with pytest.raises(ConfigError, match="8 bits"):
            draw_order(sd, stack, order, Drawing(1, size=(32, 32)), "base", None)
        hook.remove()
        assert not calls


def test_a_mask_is_packed_once_for_all_pictures_of_a_batch(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with AdapterStack(sd) as stack:
        stack.add(adapter(sd))
        packings: list[object] = []
        save = Image.Image.save
        monkeypatch.setattr(Image.Image, "save", lambda *given, **more: packings.append(1) or save(*given, **more))
        order = Order(["x"] * 4, list(range(4)), {"a": [Region(HALF) for _ in range(4)]})
        made = draw_order(sd, stack, order, Drawing(1, size=(32, 32)), "base", None)
    assert len(packings) == len(made[0][1]["masks"]) == 1
    assert [said["batch"]["index"] for _, said in made] == [0, 1, 2, 3]


def test_the_library_is_walked_once_for_any_number_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path)
    walks: list[str] = []
    walk = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: walks.append(pattern) or walk(folder, pattern))
    parse_prompts(["x <lora:ink:mask=left.png>"] * 5, Library(tmp_path))
    assert walks == ["*"]


def test_a_grid_of_regions(shelf: Path) -> None:
    ink = shelf / "loras" / "ink.safetensors"
    few = ("-b", shelf / "base", *FEW)
    run("grid", "x", "-a", f"{ink}:3:mask=0-0.5,0-1", "--weights", "0,1", *few, "-o", shelf / "half.png")
    run("grid", "x", "-a", f"{ink}:3", "--weights", "0,1", *few, "-o", shelf / "whole.png")
    assert not np.array_equal(pixels(shelf / "half.png"), pixels(shelf / "whole.png"))


@pytest.mark.parametrize("command", ["generate", "grid"])
def test_help_says_how_a_region_is_spelled(command: str) -> None:
    assert ":mask=" in run(command, "--help")


def test_a_file_of_a_blend_holds_no_region(shelf: Path) -> None:
    ink = shelf / "loras" / "ink.safetensors"
    said = run("merge", f"{ink}:0.5:mask=0-0.5,0-1", "-o", shelf / "m.safetensors", fails=ConfigError)
    assert "place" in said
    for precision in ("fp32", "nf4"):
        text = f"{ink}:0.5:mask=0-0.5,0-1"
        said = run("bake", text, "-b", shelf / "base", "-o", shelf / "b", "--precision", precision, fails=ConfigError)
        assert "place" in said
    assert not (shelf / "b").exists()
