"""Pictures are opened upright, in RGB, within limits; every kind of damage is one sentence with the path."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.data.pictures import PictureRules, inspect_picture, open_mask, open_picture
from lora_diffusion.errors import DataError

RULES = PictureRules(min_side=1)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _bomb(path: Path, side: int) -> None:
    """A PNG whose header claims side x side pixels, and no more than that."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = _noise(6, 4)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png", RULES)), np.asarray(upright))
    assert inspect_picture(tmp_path / "a.png", RULES).size == (6, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_alpha_lies_on_the_chosen_background(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (2, 1), (10, 10, 10, 0))
    clear.putpixel((1, 0), (80, 80, 80, 255))
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "PA":
        clear.save(path)
    elif mode == "P":
        clear.quantize(method=Image.Quantize.FASTOCTREE).save(path)
    else:
        clear.convert(mode).save(path)
    found = open_picture(path, PictureRules(background=(0, 200, 0), min_side=1))
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == (0, 200, 0)
    assert np.allclose(found.getpixel((1, 0)), 80, atol=1)


def test_half_transparent_is_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.allclose(open_picture(tmp_path / "a.png", RULES).getpixel((0, 0)), (255, 127, 127), atol=1)


def test_sixteen_bit_greys_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    found = np.asarray(open_picture(tmp_path / "a.png", RULES))[0, :, 0]
    assert found.tolist() == [0, 127, 255]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    _noise(8, 8).convert(mode).save(tmp_path / "a.tif")
    assert open_picture(tmp_path / "a.tif", RULES).mode == "RGB"


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(_: Image.Image) -> None:
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    _bomb(tmp_path / "a.png", side)
    with pytest.raises(DataError, match="and was not decoded"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    _noise(64, 64).save(path)
    assert open_picture(path).size == (64, 64)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=rf"a\.{suffix}: is "):
        open_picture(path)


def test_damaged_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    _noise(64, 64).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated or damaged"):
        open_picture(path)


def test_what_is_no_picture_is_too_small_or_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(DataError, match="is no picture of a known format"):
        open_picture(tmp_path / "page.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="is no picture of a known format"):
        open_picture(tmp_path / "empty.png")
    _noise(15, 64).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match="15x64 pixels; expected at least 16"):
        open_picture(tmp_path / "thin.png")
    with pytest.raises(DataError, match="does not exist"):
        open_picture(tmp_path / "gone.png")
    Image.fromarray(np.zeros((20, 20), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="floating-point pixels"):
        open_picture(tmp_path / "float.tif")


def test_content_hash_is_of_the_bytes(tmp_path: Path) -> None:
    _noise(16, 16).save(tmp_path / "a.png")
    _noise(16, 16).save(tmp_path / "b.png")
    _noise(16, 17).save(tmp_path / "c.png")
    a, b, c = (inspect_picture(tmp_path / f"{name}.png").content for name in "abc")
    assert a == b != c


def test_masks_are_grey_and_as_large_as_their_picture(tmp_path: Path) -> None:
    _noise(16, 20).save(tmp_path / "m.png")
    assert open_mask(tmp_path / "m.png", (16, 20)).mode == "L"
    with pytest.raises(DataError, match="the mask is 16x20 pixels, its picture is 20x16"):
        open_mask(tmp_path / "m.png", (20, 16))
