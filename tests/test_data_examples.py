"""Folder -> examples: every spelling of captions, repeats, weights, masks; one sentence for each fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.data.examples import Source, find_examples
from lora_diffusion.errors import ConfigError, DataError


def _put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text(f"caption of {path.stem}\n")


def _captions(folder: Path, **settings: object) -> dict[str, str]:
    return {e.picture.relative_to(folder).as_posix(): e.caption for e in find_examples(folder, **settings)}


def test_text_and_caption_files_beside_pictures_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    _put(tmp_path, "b.png", "b.txt", "a.png", "a.caption", ".hidden.png", ".cache/x.png")
    assert list(_captions(tmp_path).items()) == [("a.png", "caption of a"), ("b.png", "caption of b")]


def test_a_caption_is_one_line_without_a_byte_order_mark(tmp_path: Path) -> None:
    _put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("\ufeffa fox,\r\n  red ".encode())
    assert _captions(tmp_path) == {"a.png": "a fox, red"}


@pytest.mark.parametrize("key", ["text", "caption"])
def test_metadata_jsonl_wins_over_files_and_reaches_into_sub_folders(tmp_path: Path, key: str) -> None:
    _put(tmp_path, "a.png", "a.txt", "sub/b.png")
    lines = [{"file_name": "a.png", key: "from metadata"}, {"file_name": "sub/b.png", key: "deep", "width": 4}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert _captions(tmp_path) == {"a.png": "from metadata", "sub/b.png": "deep"}


def test_metadata_json_as_a_list_and_as_kohyas_mapping_without_suffixes(tmp_path: Path) -> None:
    _put(tmp_path, "one/a.png", "two/b.png")
    (tmp_path / "one/metadata.json").write_text(json.dumps([{"file_name": "a.png", "text": "listed"}]))
    (tmp_path / "two/metadata.json").write_text(json.dumps({"b": {"tags": "mapped"}}))
    assert _captions(tmp_path) == {"one/a.png": "listed", "two/b.png": "mapped"}


def test_kohya_folders_repeat_and_caption_what_has_no_caption(tmp_path: Path) -> None:
    _put(
        tmp_path,
        "10_sks dog/a.png",
        "10_sks dog/b.png",
        "10_sks dog/b.txt",
        "3_/c.png",
        "3_/c.txt",
        "plain/d.png",
        "plain/d.txt",
    )
    found = {e.picture.name: (e.caption, e.share) for e in find_examples(tmp_path)}
    assert found == {
        "a.png": ("sks dog", 10),
        "b.png": ("caption of b", 10),
        "c.png": ("caption of c", 3),
        "d.png": ("caption of d", 1),
    }


def test_several_folders_carry_weights_repeats_and_regularisation(tmp_path: Path) -> None:
    _put(tmp_path, "style/a.png", "style/a.txt", "class/2_man/b.png")
    sources = [Source(tmp_path / "style", weight=0.5, repeats=3), Source(tmp_path / "class", regularisation=True)]
    style, regular = find_examples(sources)
    assert (style.share, style.regularisation) == (1.5, False)
    assert (regular.share, regular.caption, regular.regularisation) == (2, "man", True)


def test_masks_are_found_beside_and_in_their_folder_and_are_no_examples(tmp_path: Path) -> None:
    _put(tmp_path, "a.png", "a.txt", "masks/a.png", "b.png", "b.txt", "b.mask.png", "c.png", "c.txt")
    masks = {e.picture.name: e.mask for e in find_examples(tmp_path)}
    assert masks == {"a.png": tmp_path / "masks/a.png", "b.png": tmp_path / "b.mask.png", "c.png": None}


def test_pictures_without_captions_are_all_listed_and_two_settings_help(tmp_path: Path) -> None:
    _put(tmp_path, "red_fox-2.png", "b.png", "b.txt", "empty.png")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="2 of 3 pictures have no caption") as caught:
        find_examples(tmp_path)
    assert str(tmp_path / "red_fox-2.png") in str(caught.value)
    assert str(tmp_path / "empty.png") in str(caught.value)
    assert _captions(tmp_path, fallback_caption="")["empty.png"] == ""
    assert _captions(tmp_path, fallback_caption="a thing")["red_fox-2.png"] == "a thing"
    assert _captions(tmp_path, caption_from="filename")["red_fox-2.png"] == "red fox 2"


def test_missing_and_empty_folders_and_wrong_settings_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; expected a folder"):
        find_examples(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no pictures"):
        find_examples(tmp_path)
    _put(tmp_path, "a.png", "a.txt")
    with pytest.raises(DataError, match="is a file"):
        find_examples(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="caption_from is 'name'"):
        find_examples(tmp_path, caption_from="name")
    with pytest.raises(ConfigError, match="must be above zero"):
        find_examples([Source(tmp_path, weight=0)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text": ', "line 1: is not valid JSON"),
        ('{"file_name": "gone.png", "text": "x"}', "names 'gone.png', which is no picture"),
        ('{"file_name": "../outside.png", "text": "x"}', "which is no picture in"),
        ('{"file_name": "a.png"}', "expected 'file_name' and 'text'"),
        ("[1]", "expected a record in braces, found list"),
    ],
)
def test_metadata_that_cannot_be_used_is_an_error_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    folder = tmp_path / "data"
    _put(tmp_path, "outside.png", "data/a.png")
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        find_examples(folder)


def test_a_caption_that_is_not_utf8_is_an_error_with_its_path(tmp_path: Path) -> None:
    _put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8"):
        find_examples(tmp_path)
