"""Some of the damaged folders and random plans of ``fuzz.py``, and whether it would see a fault."""

from __future__ import annotations

import pickle
import random
import shutil
import socket
from pathlib import Path

import fuzz_writes
import pytest
from families import one_thread  # noqa: F401
from fuzz import folder_case, outcome, run_folders, run_plans, watched
from fuzz_targets import TARGETS, Target
from fuzz_writes import run_writes
from mutation import SENTINEL, damaged_folder, trap

from blockfit.errors import BlockfitError
from blockfit.formats.folder import load

SEED = 7


def test_damaged_folders_are_read_or_refused_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tally = run_folders(150, SEED)
    assert tally["fault"] == 0, capsys.readouterr().err
    assert tally["refused"] > 75
    assert tally["ok"] > 15


def test_random_plans_are_applied_or_refused_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tally = run_plans(200, SEED)
    assert tally["fault"] == 0, capsys.readouterr().err
    assert min(tally["refused"], tally["ok"]) > 30


def test_random_targets_are_written_alone_or_refused_and_nothing_of_the_users_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Case 1."""
    tally = run_writes(300, SEED, outcome)
    assert tally["fault"] == 0, capsys.readouterr().err
    assert min(tally["refused"], tally["ok"]) > 60


def test_the_fuzz_sees_a_writer_that_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deletes(target: str, overwrite: bool) -> fuzz_writes.Written:
        shutil.rmtree("photos")
        return fuzz_writes.Written(Path("new").resolve())

    monkeypatch.setattr(fuzz_writes, "WRITERS", {"deleting": deletes})
    result, _, said = fuzz_writes.write_case(0, SEED, outcome, tmp_path)
    assert result == "fault"
    assert "a foreign file was changed or is gone" in said


def test_a_pickle_under_another_name_is_never_loaded(tmp_path: Path) -> None:
    for name in ("blockfit.json", "model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in TARGETS["saved demo"].files().items():
            (folder / file).write_bytes(trap(tmp_path) if file == name else content)
        with pytest.raises(BlockfitError, match=name):
            load(folder)
    assert not (tmp_path / SENTINEL).exists()
    pickle.loads(trap(tmp_path))  # noqa: S301  the trap works
    assert (tmp_path / SENTINEL).exists()


def _says(message: str) -> None:
    raise BlockfitError(message)


def test_the_fuzz_tells_a_refusal_from_a_fault() -> None:
    assert outcome(_says, "blocks 3–9 and 8–11 overlap")[0] == "refused"
    assert outcome(_says, "")[0] == "fault"
    assert outcome(lambda: None)[0] == "ok"
    assert outcome(lambda: {}["x"])[0] == "fault"


def test_the_fuzz_sees_side_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "allowed").mkdir()
    with watched(tmp_path / "allowed") as seen:
        (tmp_path / "allowed" / "x").write_text("mine")
    assert seen == []
    with watched(tmp_path / "allowed") as seen:
        (tmp_path / "x").write_text("not mine")
        pickle.loads(pickle.dumps(Path))  # noqa: S301
        with socket.socket() as one, pytest.raises(OSError, match=r".*"):
            one.connect(("127.0.0.1", 9))
    assert [what.split()[0] for what in seen] == ["open", "pickle.find_class", "socket.connect"]

    def spoils(folder: Path, empty: Path) -> None:
        (folder / "new").write_text("")

    monkeypatch.setitem(TARGETS, "spoiling", Target("spoiling", lambda folder: None, spoils))
    monkeypatch.setattr(Target, "files", lambda target: {"a.json": b"{}"})
    assert folder_case(0, SEED, tmp_path, ["spoiling"])[0] == "fault"


def test_damage_comes_from_the_seed_alone(tmp_path: Path) -> None:
    files = {"a.json": b'{"depth": [1, 2, {"x": "y"}]}', "b.bin": bytes(range(99))}
    for number in range(40):
        said = []
        for name in ("one", "two"):
            place = tmp_path / f"{number}{name}"
            place.mkdir()
            said.append(damaged_folder(place / "folder", files, random.Random(number)))
        assert said[0] == said[1]
        for file in (tmp_path / f"{number}one" / "folder").iterdir():
            if file.is_file() and not file.is_symlink() and "pickle" not in said[0]:
                twin = tmp_path / f"{number}two" / "folder" / file.name
                assert file.read_bytes() == twin.read_bytes()
