"""Some of the round trips of ``round_trips.py``, and whether it would see a fault."""

from __future__ import annotations

import functools
from pathlib import Path

import fresh
import pytest
import torch
from families import one_thread  # noqa: F401
from round_trips import EVERY, MATTERS, drawn, round_trips, same

import blockfit


@pytest.mark.parametrize("altered", [None, MATTERS])
def test_what_was_saved_is_what_another_process_loads(
    altered: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["vit-classifier" if altered else "timm-convit", "plain"]
    tally = round_trips(few, 0, altered, tmp_path)
    assert tally["fault"] == 0, capsys.readouterr().err
    assert tally["equal"] + tally["own"] + tally["refused"] == len(few)


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("round_trips.READER", fresh.python)


def test_a_loader_that_gives_another_model_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import os, runpy, sys, blockfit\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[1]))\n"
        "load = blockfit.load\n"
        "def loses(folder, **given):\n"
        "    model = load(folder, **given)\n"
        "    model.norm.eps *= 2\n"
        "    return model\n"
        "blockfit.load = loses\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    monkeypatch.setattr("round_trips.READER", functools.partial(fresh.python, wrong))
    assert round_trips(["timm-vit"], 0, None, tmp_path)["fault"] == 1
    assert "fault: timm-vit" in capsys.readouterr().err


def test_there_are_sixty_families_and_changes_are_the_same_in_every_process() -> None:
    assert len(EVERY) >= 60
    assert drawn("plain", 3) == drawn("plain", 3)
    assert not same([torch.ones(2)], [torch.ones(2) + 1e-7])


def test_a_users_own_model_that_is_not_the_saved_one_is_refused(tmp_path: Path) -> None:
    family = EVERY["plain"]
    model = family.build()
    model.norm.eps = 0.1  # type: ignore[union-attr,assignment]
    model.norm.label = "one"  # type: ignore[union-attr,assignment]
    result = blockfit.compress(model, family.images(12), spans=["1:2"], final=0)
    blockfit.save(result, tmp_path / "small")
    with pytest.raises(blockfit.BlockfitError, match=r"norm\.eps is 1e-05, saved 0\.1"):
        blockfit.load(tmp_path / "small", model=family.build())
    again = family.build(seed=4)
    again.norm.eps = 0.1  # type: ignore[union-attr,assignment]
    again.norm.label = "another"  # type: ignore[union-attr,assignment]
    again.steps = 900  # what no output depends on
    with pytest.warns(blockfit.BlockfitWarning, match=r"norm\.label is 'another', saved 'one'"):
        loaded = blockfit.load(tmp_path / "small", model=again)
    assert torch.equal(loaded(family.images()), result.model(family.images()))
