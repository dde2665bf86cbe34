"""Every row of docs/mistakes.md: what was typed gets that sentence, code 2, and no work is done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from commandline import blockfit_command
from docs_world import photos

from blockfit.commands import options as opt

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
HINT = re.compile(r" \(blockfit[\w ]* --help shows what there is\)$")


def rows() -> list[tuple[str, str]]:
    """What is typed after ``blockfit``, and the sentence."""
    found = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [(typed, sentence.replace("`", "")) for typed, sentence in found]


def test_there_are_fifteen_of_several_commands() -> None:
    assert len(rows()) >= 15
    assert len({typed.split()[0] for typed, _ in rows()}) >= 8


@pytest.mark.parametrize(("typed", "sentence"), rows(), ids=[typed for typed, _ in rows()])
def test_a_mistake_gets_its_sentence_before_any_work(
    typed: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("a model or images were loaded")

    monkeypatch.chdir(tmp_path)
    for name in ("load", "load_small"):
        monkeypatch.setattr(opt.Code, name, worked)
    monkeypatch.setattr(opt.Reading, "open", worked)
    photos(Path("PHOTOS"), 4, 0)
    Path("empty").mkdir()
    Path("letters").mkdir()
    Path("letters/dear.txt").write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = blockfit_command(*shlex.split(typed))
    assert done.code == 2, done.err
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert HINT.sub("", line) == f"blockfit: error: {sentence}"
    assert sorted(tmp_path.rglob("*")) == before
