"""Writing a folder: nothing half written, nothing lost, nothing of others touched."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from families import FAMILIES
from stored import PLAN, output, saved, small_model

from blockfit import files as atomic
from blockfit.errors import BlockfitError
from blockfit.formats import folder as store
from blockfit.formats.folder import check_folder, load, save

# -- whole or not at all ------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("text")
    for overwrite in (False, True):
        with pytest.raises(BlockfitError, match="not empty and was not saved by blockfit"):
            check_folder(tmp_path / "photos", overwrite)
        with pytest.raises(BlockfitError, match="is a file"):
            check_folder(tmp_path / "file", overwrite)
    with pytest.raises(BlockfitError, match=r"cannot write .*file/small"):
        saved(tmp_path / "file" / "small")


def test_a_saved_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    first = saved(folder, "plain")
    model, blocks, source, images = small_model("plain")
    with pytest.raises(BlockfitError, match=r"holds what an earlier run wrote.*overwrite=True"):
        save(folder, model, blocks, PLAN, source=source, report={})
    own = FAMILIES["plain"].build()
    assert torch.equal(output(load(folder, model=own), images), output(first, images))
    save(folder, model, blocks, PLAN, source=source, report={}, overwrite=True)
    assert torch.equal(output(load(folder, model=own), images), output(model, images))
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(BlockfitError, match=r"also holds notes\.txt"):
        save(folder, model, blocks, PLAN, source=source, report={}, overwrite=True)


def rename_fails(monkeypatch: pytest.MonkeyPatch, when: Callable[[Path, Path], bool]) -> None:
    real = Path.rename

    def rename(old: Path, new: Path) -> Path:
        if when(old, new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(old, new)

    monkeypatch.setattr(Path, "rename", rename)


def test_what_was_replaced_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the new folder nor, after that, the old one can take the name."""
    folder = tmp_path / "small"
    saved(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model, blocks, source, _ = small_model("plain")
    rename_fails(monkeypatch, lambda old, new: new == folder)
    with pytest.raises(BlockfitError, match="what it held is now at") as raised:
        save(folder, model, blocks, PLAN, source=source, report={}, overwrite=True)
    kept = Path(str(raised.value).rpartition("now at ")[2])
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_run_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_the_mark_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = Path.write_bytes

    def note(path: Path, *args: Any, **kwargs: Any) -> int:
        written.extend(p.name for p in path.parent.iterdir())
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_bytes", note)
    saved(tmp_path / "small", "vit-classifier")
    assert sorted(written) == ["config.json", "model.safetensors", "model.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["weights", "disk", "name"])
def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, overwrite: bool
) -> None:
    folder = tmp_path / "small"
    if overwrite:
        saved(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if overwrite else {}
    model, blocks, source, _ = small_model("plain")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "weights":
        monkeypatch.setattr(store, "save_file", full)
    elif step == "disk":
        monkeypatch.setattr(atomic, "_to_disk", full)
    else:
        rename_fails(monkeypatch, lambda old, new: new == folder and old.name != "old")
    with pytest.raises(BlockfitError, match=r"cannot write .*small: No space left on device"):
        save(folder, model, blocks, PLAN, source=source, report={}, overwrite=overwrite)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["small"] if overwrite else [])
    if overwrite:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


KILLED = """
import os, signal, sys
from test_folder import small_model, PLAN
from blockfit import files as atomic
from blockfit.formats.folder import save
model, blocks, source, _ = small_model("plain")
calls = 0
real = atomic._to_disk
def kill(path):
    global calls
    calls += 1
    if calls == 3:  # all files are complete, only the name is missing
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
atomic._to_disk = kill
save(sys.argv[1] + "/small", model, blocks, PLAN, source=source, report={})
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_a_killed_run_leaves_no_folder_that_loads(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = fresh.python("-c", KILLED, tmp_path, env=environment, check=False)
    assert done.returncode == -9, done.stderr
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert (left[0] / "blockfit.json").is_file()
    with pytest.raises(BlockfitError, match="no folder that blockfit saved"):
        load(left[0], model=FAMILIES["plain"].build())
