"""Every command that writes finds out before any work whether it can, and takes nobody's place."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command
from stored import PLAN, saved, small_model

import blockfit
from blockfit.checkpoint import Checkpoint, forget
from blockfit.errors import BlockfitError
from blockfit.formats import folder as store

ABSENT = "there-is-no-such-model/x"
"""Loaded by no command whose target is refused first."""

FOLDERS: dict[str, tuple[str, ...]] = {
    "compress": ("compress", ABSENT, "--images", "digits", "--remove", "1", "-o"),
    "compress from a sweep": ("compress", "--from", ABSENT, "--remove", "1", "-o"),
    "sweep": ("sweep", ABSENT, "--images", "digits", "-o"),
    "analyze": ("analyze", ABSENT, "--images", "digits", "-o"),
    "export --plain": ("export", ABSENT, "--plain", "-o"),
    "export --hub": ("export", ABSENT, "--hub", "-o"),
    "quantize": ("quantize", ABSENT, "--int8", "weight-only", "-o"),
    "reproduce": ("reproduce", "--model", ABSENT, "--data", "digits", "-o"),
    "demo": ("demo", "-o"),
    "report --pictures": ("report", ABSENT, "-o", "fresh.html", "--pictures"),
}
FILES: dict[str, tuple[tuple[str, ...], str]] = {
    "export --onnx": (("export", ABSENT, "--onnx", "-o"), ".onnx"),
    "export --pt2": (("export", ABSENT, "--pt2", "-o"), ".pt2"),
    "quantize": (("quantize", ABSENT, "--int8", "onnx-dynamic", "-o"), ".onnx"),
    "report": (("report", ABSENT, "-o"), ".html"),
    "bench --markdown": (("bench", ABSENT, "--against", ABSENT, "--markdown"), ".md"),
    "bench --picture": (("bench", ABSENT, "--against", ABSENT, "--picture"), ".png"),
    "compress --report": (
        ("compress", ABSENT, "--images", "digits", "--remove", "1", "-o", "fresh", "--report"),
        ".html",
    ),
}
OVERWRITING = ("compress", "analyze", "export", "quantize", "bench", "demo")


def _words(command: tuple[str, ...], target: str) -> list[str]:
    more = ["--overwrite"] if command[0] in OVERWRITING else []
    return [*command, target, *more]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder holds ``photos`` with a user's files of every name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for suffix in (".onnx", ".pt2", ".html", ".md", ".png", ".jpg"):
        (folder / f"small{suffix}").write_text("mine")
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    return folder


def _all(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("target", ["photos", "nothere/../photos", "link/", "link/../photos/."])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_users_folder_is_refused_before_any_work(name: str, target: str, photos: Path) -> None:
    """Case 1: the path that is checked is the one that is written."""
    if name == "report --pictures":
        pytest.skip("pictures may lie beside others; files of their names are looked at one by one")
    before = _all(photos.parent)
    error = blockfit_command(*_words(FOLDERS[name], target)).error
    assert "is not empty and" in error
    assert error.startswith(target.rstrip("/."))
    assert _all(photos.parent) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_in_the_place_of_a_folder_is_refused_before_any_work(
    name: str, photos: Path
) -> None:
    for target in ("photos/small.jpg", "photos/small.jpg/new"):
        assert "is a file" in blockfit_command(*_words(FOLDERS[name], target)).error
    assert sorted(path.name for path in photos.parent.iterdir()) == ["link", "photos"]


@pytest.mark.parametrize("name", FILES)
def test_a_users_file_and_a_folder_in_its_place_are_refused_before_any_work(
    name: str, photos: Path
) -> None:
    """Case 1, for files: also with --overwrite."""
    command, suffix = FILES[name]
    before = _all(photos.parent)
    for target in (f"photos/small{suffix}", f"nothere/../link/small{suffix}"):
        error = blockfit_command(*_words(command, target)).error
        assert error == f"{target} was not written by blockfit; choose a new name"
    (photos.parent / f"folder{suffix}").mkdir()
    assert "is a folder" in blockfit_command(*_words(command, f"folder{suffix}")).error
    assert _all(photos.parent) == before


@pytest.mark.skipif(not os.access("/proc/self", os.F_OK), reason="no /proc here")
def test_a_place_where_nothing_can_be_made_is_refused_before_any_work(photos: Path) -> None:
    for command in (*FOLDERS.values(), *(command for command, _ in FILES.values())):
        suffix = next((end for one, end in FILES.values() if one == command), "")
        error = blockfit_command(*_words(command, f"/proc/self/small{suffix}")).error
        assert error.startswith(f"cannot write /proc/self/small{suffix}: ")


def test_the_working_folder_and_mount_points_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BlockfitError, match=r"\. is the folder that you are in.*such as small"):
        store.check_folder(".")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    with pytest.raises(BlockfitError, match=r"disk is a mount point.*such as disk/small"):
        store.check_folder("disk")
    store.check_folder("disk/small")


def test_paths_that_no_path_can_be_are_one_sentence(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300, "~nobody-of-this-name/x"):
        with pytest.raises(BlockfitError, match=r"cannot write|names no home folder"):
            store.check_folder(name if name.startswith("~") else tmp_path / name)
    long = tmp_path / ("😀" * 63)  # 252 bytes: one more name of that length would not fit beside it
    saved(long)
    assert (long / "blockfit.json").is_file()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_all_files_get_the_mode_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        saved(tmp_path / "small")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "small").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "small").stat().st_mode) == 0o777 & ~umask


def test_what_comes_into_a_folder_while_it_is_replaced_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "small"
    saved(folder)
    model, blocks, source, _ = small_model("plain")
    real = store.save_file

    def slow(*args: Any, **kwargs: Any) -> None:
        (folder / "diary.txt").write_text("mine")
        real(*args, **kwargs)

    monkeypatch.setattr(store, "save_file", slow)
    with pytest.raises(BlockfitError, match=r"also holds diary\.txt"):
        store.save(folder, model, blocks, PLAN, source=source, report={}, overwrite=True)
    assert (folder / "diary.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_folders_that_a_refused_run_made_are_gone(tmp_path: Path) -> None:
    model, blocks, source, _ = small_model("plain")
    with pytest.raises(BlockfitError, match="cannot be written as JSON"):
        store.save(
            tmp_path / "a" / "b", model, blocks, PLAN, source=source, report={"x": torch.ones(1)}
        )
    assert list(tmp_path.iterdir()) == []


def test_progress_is_kept_in_no_folder_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "weights-0.safetensors").write_text("mine")
    forget(tmp_path)
    assert (tmp_path / "weights-0.safetensors").read_text() == "mine"
    with pytest.raises(BlockfitError, match="is no progress of a run"):
        Checkpoint(tmp_path, {}).save("weights", 1)
    (tmp_path / "cat.jpg").write_text("mine")
    with pytest.raises(BlockfitError, match=r"holds cat\.jpg, which is no progress"):
        Checkpoint(tmp_path, {})
    with pytest.raises(BlockfitError, match=r"holds cat\.jpg"):
        blockfit.compress("demo", "digits", remove=1, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
