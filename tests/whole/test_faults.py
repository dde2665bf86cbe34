"""Disks that are full, folders that are read-only, two runs at once; and the table of faults."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import re
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, one_thread  # noqa: F401
from pictures import PIXELS, encoded, folder_of, grey
from PIL import Image
from stored import PLAN, REPORT, small_model

import blockfit
from blockfit import files as atomic
from blockfit.errors import BlockfitError
from blockfit.evaluation import analysis
from blockfit.evaluation.analysis import analyze
from blockfit.formats.folder import load, save

TABLE = Path(__file__).parents[2] / "docs" / "faults.md"


def small_folder(folder: Path, overwrite: bool = False) -> torch.nn.Module:
    model, blocks, source, _ = small_model("plain")
    save(folder, model, blocks, PLAN, source=source, report=REPORT, overwrite=overwrite)
    return model


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- disks --------------------------------------------------------------------------------------


def _mounted(place: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")


def _unmounted(place: Path) -> None:
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 kB; the tiny model needs more."""
    place = tmp_path / "disk"
    place.mkdir()
    _mounted(place, "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    yield place
    _unmounted(place)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder mounted read-only, so that root cannot write there either; a model is in it."""
    place = tmp_path / "fixed"
    place.mkdir()
    small_folder(place / "small")
    _mounted(place, "--bind", str(place))
    remounted = subprocess.run(
        ["mount", "-o", "remount,ro,bind", str(place)], capture_output=True, check=False
    )
    if remounted.returncode:
        _unmounted(place)
        pytest.skip("no read-only mounts here")
    yield place
    _unmounted(place)


def test_a_disk_that_fills_up_leaves_no_part_behind(full_disk: Path) -> None:
    with pytest.raises(BlockfitError, match=r"cannot write .*small: .*; nothing was saved"):
        small_folder(full_disk / "small")
    assert list(full_disk.iterdir()) == []


def test_a_full_disk_keeps_the_model_that_was_to_be_replaced(full_disk: Path) -> None:
    _unmounted(full_disk)
    _mounted(full_disk, "-t", "tmpfs", "-o", "size=140k", "tmpfs")
    small_folder(full_disk / "small")
    before = content(full_disk / "small")
    with pytest.raises(BlockfitError, match="nothing was saved"):
        small_folder(full_disk / "small", overwrite=True)  # there is room for one, not for two
    assert [path.name for path in full_disk.iterdir()] == ["small"]
    assert content(full_disk / "small") == before
    load(full_disk / "small", model=FAMILIES["plain"].build())


def test_a_read_only_folder_is_refused_and_its_model_still_loads(read_only: Path) -> None:
    before = content(read_only / "small")
    for target, overwrite in (("small", True), ("new", False)):
        with pytest.raises(BlockfitError, match="Read-only file system; nothing was saved"):
            small_folder(read_only / target, overwrite)
    assert [path.name for path in read_only.iterdir()] == ["small"]
    assert content(read_only / "small") == before
    load(read_only / "small", model=FAMILIES["plain"].build())


def test_an_analysis_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    result = analyze(FAMILIES["plain"].build(), FAMILIES["plain"].images(8))
    monkeypatch.setattr(atomic, "_to_disk", full)
    with pytest.raises(BlockfitError, match="No space left on device; nothing was saved"):
        analysis.write(result, tmp_path / "analysis")
    assert list(tmp_path.iterdir()) == []


# -- two runs at once ---------------------------------------------------------------------------


def _together(*runs: Callable[[], object]) -> list[BlockfitError]:
    """What each of some runs, all at once in threads, was refused with."""
    start = threading.Barrier(len(runs))
    refused: list[BlockfitError] = []

    def one(run: Callable[[], object]) -> None:
        start.wait()
        try:
            run()
        except BlockfitError as error:
            refused.append(error)

    threads = [threading.Thread(target=one, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refused


FORM = atomic.FolderForm("mark", "", ("mark", "other"))


def _writes(folder: Path, text: str, meet: threading.Barrier) -> Callable[[], None]:
    """Fills a folder as ``save`` does; all writers reach the end before one takes the name."""

    def run() -> None:
        with atomic.new_folder(folder, FORM) as partial:
            for name in ("mark", "other"):
                (partial / name).write_text(text)
            meet.wait()

    return run


def test_of_two_runs_into_one_folder_one_wins_whole_and_the_other_says_so(tmp_path: Path) -> None:
    for number in range(20):
        folder, meet = tmp_path / f"{number}", threading.Barrier(2)
        refused = _together(_writes(folder, "one", meet), _writes(folder, "two", meet))
        assert len(refused) == 1
        assert re.search(r"another run has written .*; nothing was saved", str(refused[0]))
        assert len(set(content(folder).values())) == 1
        assert len(content(folder)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(20)))


def test_of_two_runs_that_replace_a_folder_one_wins_whole(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    for _ in range(20):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        (folder / "mark").write_text("old")
        meet = threading.Barrier(2)

        def run(text: str, meet: threading.Barrier = meet) -> None:
            with atomic.new_folder(folder, FORM, overwrite=True) as partial:
                (partial / "mark").write_text(text)
                meet.wait()

        refused = _together(lambda: run("one"), lambda: run("two"))
        assert len(refused) <= 1  # both may succeed, one after the other
        assert content(folder)["mark"] in (b"one", b"two")
        assert [path.name for path in tmp_path.iterdir()] == ["small"]


# -- images -------------------------------------------------------------------------------------


def _walked(folder: Path, **options: object) -> blockfit.Images:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = blockfit.images(folder, preprocessing=PIXELS, **options)
        for batch in images.batches():
            assert len(batch.inputs)
    return images


def test_odd_pictures_among_good_ones_are_read_or_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 60)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (folder / "zero.png").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(encoded(noise, "JPEG")[:900])
    Image.new("1", (16_000, 12_000)).save(folder / "bomb.png")
    Image.new("RGB", (20_000, 3)).save(folder / "line.png")
    (folder / "wrong.jpg").write_bytes(encoded(grey(9), "PNG"))
    grey(9, 1).save(folder / "dot.png")
    Image.new("CMYK", (8, 8)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    frames = [grey(level) for level in (1, 2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    images = _walked(folder)
    skipped = {Path(name).name for name in images.skipped}
    assert skipped == {"zero.png", "truncated.jpg", "bomb.png", "line.png"}
    assert len(images) == 65
    allowed = _walked(folder, max_pixels=200_000_000)
    assert {Path(name).name for name in allowed.skipped} == skipped - {"bomb.png"}


def test_more_than_a_tenth_of_unreadable_pictures_stops_the_run(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 20)
    for number in range(2):
        (folder / f"{number:03d}.png").write_bytes(b"")
    assert len(_walked(folder).skipped) == 2
    (folder / "002.png").write_bytes(b"GIF89a")
    with pytest.raises(
        BlockfitError, match=r"3 or more of 20 images .* cannot be read: .*000\.png"
    ):
        _walked(folder)


def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 20)
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    images = _walked(folder)
    assert {Path(name).name for name in images.skipped} == {"pipe.png", "device.png"}
    os.mkfifo(tmp_path / "list.txt")
    for name in ("list.txt", "pipe.png"):
        with pytest.raises(BlockfitError, match=r"regular file|no file or folder|cannot be read"):
            _walked(tmp_path / name)


# -- the table ----------------------------------------------------------------------------------


def _rows() -> list[list[str]]:
    first = TABLE.read_text("utf-8").split("\n## ")[0]
    header, *lines = [line for line in first.splitlines() if line.startswith("| ")]
    assert header.startswith("| fault ")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_row_of_the_table_of_faults_names_tests_that_exist() -> None:
    rows = _rows()
    assert len(rows) > 30
    known: dict[str, set[str]] = {}
    for row in rows:
        assert len(row) == 4, row
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row[3])
        assert named, row
        for file, test in named:
            if file not in known:
                (path,) = Path(__file__).parents[1].rglob(f"{file}.py")
                tree = ast.parse(path.read_text("utf-8"))
                known[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert test in known[file], f"{file}.py has no {test}"
