"""What is written appears whole or not at all, and nothing is left of what broke off."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lora_diffusion.drafts import ABANDONED, clear_abandoned, whole_file, whole_folder

FAULTS = [OSError(28, "No space left on device"), ValueError("a fault of ours"), KeyboardInterrupt()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _broken_off(file: Path, fault: BaseException) -> None:
    file.write_text("half")
    raise fault


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_breaks_off_leaves_what_was_there(tmp_path: Path, there: bool, fault: BaseException) -> None:
    path = tmp_path / "a.txt"
    if there:
        path.write_text("before")
    with pytest.raises(type(fault)), whole_file(path) as draft:
        _broken_off(draft, fault)
    assert names(tmp_path) == ["a.txt"] * there
    assert not there or path.read_text() == "before"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_breaks_off_leaves_what_was_there(tmp_path: Path, there: bool, fault: BaseException) -> None:
    path = tmp_path / "a"
    if there:
        path.mkdir()
        (path / "one").write_text("before")
    with pytest.raises(type(fault)), whole_folder(path) as draft:
        _broken_off(draft / "one", fault)
    assert names(tmp_path) == ["a"] * there
    assert not there or (path / "one").read_text() == "before"


@pytest.mark.parametrize("fault", [FAULTS[0], FAULTS[2]])
def test_a_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "a", Path.rename
    path.mkdir()
    (path / "one").write_text("before")

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise fault
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(fault)), whole_folder(path) as draft:
        (draft / "one").write_text("after")
    assert names(tmp_path) == ["a"]
    assert (path / "one").read_text() == "before"


def test_a_folder_takes_the_place_of_all_that_was_there(tmp_path: Path) -> None:
    for content in ("before", "after"):
        with whole_folder(tmp_path / "new" / "a") as draft:
            (draft / "below").mkdir()
            (draft / "below" / content).write_text(content)
    assert names(tmp_path / "new") == ["a"]
    assert names(tmp_path / "new" / "a" / "below") == ["after"]


def test_what_was_written_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "plain folder").mkdir()
    with whole_file(tmp_path / "a") as draft:
        draft.chmod(0o600)
    with whole_folder(tmp_path / "b") as draft:
        (draft / "one").touch(0o600)
    modes = {path: path.stat().st_mode for path in tmp_path.rglob("*")}
    assert modes[tmp_path / "a"] == modes[tmp_path / "b" / "one"] == modes[tmp_path / "plain"]
    assert modes[tmp_path / "b"] == modes[tmp_path / "plain folder"]


def test_what_was_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append((tmp_path / "a").exists()))
    with whole_folder(tmp_path / "a") as draft:
        (draft / "one").touch()
    assert synced == [False, False, True]  # the file, its folder, the folder that names it


def test_drafts_are_cleared_when_nobody_has_touched_them_for_long(tmp_path: Path) -> None:
    ages = {".a.old.part": ABANDONED + 60, ".a.new.part": 0, ".b.old.part": ABANDONED + 60, ".a.old": ABANDONED + 60}
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    with whole_folder(tmp_path / "a"):
        assert ".a.old.part" not in names(tmp_path)
    assert names(tmp_path) == sorted({"a", *ages} - {".a.old.part"})
    time.sleep(0.01)
    clear_abandoned(tmp_path, ".", age=0)
    assert names(tmp_path) == [".a.old", "a"]
