"""Pictures are written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_diffusion.cli.options import refuse_existing
from lora_diffusion.errors import ConfigError
from lora_diffusion.sheet import write_picture


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    write_picture(Image.new("RGB", (4, 4), "red"), path, {"recipe": "one"})
    before = path.read_bytes()

    def full(self: Image.Image, file: Any, *args: Any, **settings: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_picture(Image.new("RGB", (4, 4), "blue"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_texts_come_back(tmp_path: Path) -> None:
    write_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"recipe": "größe"})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text == {"recipe": "größe"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["picture", "picture.jpg", "folder.png", "absent/picture.png"])
def test_names_that_cannot_be_written_are_refused_before_anything_is_drawn(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match=r"\.png|is a folder|is not there"):
        refuse_existing(tmp_path / name, overwrite=True, ending=".png")
