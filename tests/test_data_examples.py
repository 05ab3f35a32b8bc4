"""Folder -> examples: every spelling of captions, repeats, weights, masks; one sentence for each fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.data.examples import Source, find_examples, look_for
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
    with pytest.raises(DataError, match=r"2 of 3 pictures cannot be used.*put a \.txt file beside") as caught:
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


def test_all_faults_of_captions_metadata_masks_and_formats_come_in_one_list(tmp_path: Path) -> None:
    _put(tmp_path, "a.png", "b.png", "b.txt", "bare.png", "commas.png", "latin.png", "masks/gone.png", "sub/c.png")
    (tmp_path / "commas.txt").write_text(" , ,\n,")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "phone.heic").write_bytes(b"")
    (tmp_path / "phone.txt").write_text("a phone")
    lines = ['{"file_name": "a.png", "text": "one"}', '{"file_name": "gone.png", "text": "x"}', "{", "[1]"]
    lines += ['{"file_name": "a.png", "text": "two"}', '{"file_name": "../out.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "sub" / "metadata.json").write_text("{")
    found = look_for(tmp_path)
    assert {e.picture.name: e.caption for e in found.examples} == {"a.png": "one", "b.png": "caption of b"}
    assert {path.name for path in found.bad} == {"bare.png", "commas.png", "latin.png", "phone.heic", "c.png"}
    assert len(found.others) == 7
    with pytest.raises(DataError, match="5 of 7 pictures cannot be used and 7 metadata records or masks") as caught:
        find_examples(tmp_path)
    said = str(caught.value)
    parts = ["latin.txt: is not UTF-8", "phone.heic: is of a format", "commas.png: has no caption", "line 3: is not"]
    parts += ["line 4: expected a record", "gives 'a.png' a second caption", "gone.png: is the mask of no picture"]
    assert all(part in said for part in parts)


def test_a_link_back_to_its_own_folder_shows_no_picture_twice(tmp_path: Path) -> None:
    _put(tmp_path / "data", "in/a.png", "in/a.txt")
    (tmp_path / "data" / "in" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "data" / "in", target_is_directory=True)
    assert list(_captions(tmp_path / "data")) == ["in/a.png", "more/a.png"]


def test_captions_in_json_beside_pictures(tmp_path: Path) -> None:
    _put(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.json").write_text('{"caption": "a fox,\\n red", "rating": 5}')
    (tmp_path / "b.json").write_text('{"tags": ["fox", "red"]}')
    (tmp_path / "c.json").write_text('{"author": "me"}')
    found = look_for(tmp_path)
    assert [e.caption for e in found.examples] == ["a fox, red", "fox, red"]
    assert "c.json: expected 'text' or 'caption', found ['author']" in found.bad[tmp_path / "c.png"]


def test_signs_and_letters_of_any_writing_are_captions_and_punctuation_is_none(tmp_path: Path) -> None:
    _put(tmp_path, "a.png", "b.png", "c.png")
    for name, text in {"a": "\U0001f98a", "b": "猫", "c": "…!"}.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    assert {e.picture.stem for e in look_for(tmp_path).examples} == {"a", "b"}
