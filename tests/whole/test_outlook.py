"""Progress of a whole run: steps by their usual shares, and what is left from what was spent."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW, blockfit_command
from families import one_thread as one_thread

from blockfit.commands import output
from blockfit.commands.outlook import Outlook, Step, of_compress, of_sweep
from blockfit.commands.output import Output, told_time
from blockfit.search.budget import Budget
from blockfit.search.recipes import named_recipe, recipe_for

THREE = (Step("first", 1), Step("round", 6, 3), Step(r"size (?P<number>\d+) of (?P<of>\d+)", 3))


def test_parts_and_time_left_follow_the_weights() -> None:
    now = [0.0]
    outlook = Outlook(THREE, lambda: now[0])
    outlook.say("loading")
    outlook.count(1, 2)
    assert (outlook.part, outlook.number, outlook.left_s) == (0, 0, None)
    outlook.say("first pass")
    now[0] = 2
    outlook.count(1, 2)
    assert outlook.part == pytest.approx(0.05)
    assert outlook.left_s is None  # not before the first pass is done
    outlook.say("round one")
    assert outlook.part == pytest.approx(0.1)
    assert outlook.left_s == pytest.approx(18)
    outlook.say("something in between")
    outlook.count(9, 10)  # is not counted
    assert outlook.part == pytest.approx(0.1)
    outlook.say("round two")
    assert outlook.part == pytest.approx(0.3)
    for _ in range(4):
        outlook.say("round and round")
    assert outlook.part == pytest.approx(0.5)
    outlook.say("size 3 of 4")
    assert outlook.part == pytest.approx(0.85)
    outlook.count(1, 2)
    assert outlook.part == pytest.approx(0.7 + 0.3 * 2.5 / 4)
    outlook.say("first again")  # never goes back
    assert outlook.part == pytest.approx(0.7 + 0.3 * 2.5 / 4)
    now[0] = 10
    assert outlook.left_s == pytest.approx(10 * (1 - outlook.part) / outlook.part)


@pytest.mark.parametrize(
    "options",
    [("--remove", "2"), ("--params", "80%", "--cuts", "mlp,blocks"), ("--span", "9:11"),
     ("--flops", "80%", "--recipe", "paper")],
    ids=" ".join,
)  # fmt: skip
def test_every_step_of_a_compression_comes(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Outlook, "say", lambda self, line: lines.append(line))
    assert blockfit_command("compress", "demo", *FEW, *options, "-o", tmp_path / "x").code == 0
    name, value = options[:2]
    budget = None if name == "--span" else Budget.of(**{name[2:]: _of(value)})
    steps = of_compress(recipe_for("paper" if "paper" in options else "default"), budget)
    places = [
        next((n for n, line in enumerate(lines) if re.match(step.begins, line)), None)
        for step in steps
    ]
    assert None not in places, dict(zip([step.begins for step in steps], places, strict=True))
    assert places == sorted(places)  # type: ignore[type-var]


def _of(value: str) -> Any:
    return int(value) if value.isdecimal() else value


def test_every_step_of_a_sweep_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Outlook, "say", lambda self, line: lines.append(line))
    for more, recipe, points in (
        (("--points", "90,80", "--cuts", "mlp"), recipe_for("default", cuts="mlp"), 2),
        (("--select", "last", "--repair", "none"), named_recipe("default", select="last"), 10),
    ):
        lines.clear()
        folder = tmp_path / str(points)
        assert blockfit_command("sweep", "demo", *FEW, *more, "-o", folder).code == 0
        for step in of_sweep(recipe, points):
            assert any(re.match(step.begins, line) for line in lines), step.begins
        rounds = [line for line in lines if re.match(of_sweep(recipe, points)[-1].begins, line)]
        assert len(rounds) == points


def test_the_time_that_is_left_is_told_once_the_first_pass_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    for stream in (io.StringIO(), Terminal()):
        now[0] = 100.0
        with contextlib.redirect_stderr(stream):
            out = Output(as_json=False, quiet=False)
            out.expect(THREE)
            with out.working():
                out.say("first pass")
                now[0] += 30
                out.count(2, 2)
                out.say("round one")
                out.count(3, 10)
                now[0] += 10
        assert stream.getvalue().count("about 4:30 left, going by the first pass") == 1
        if stream.isatty():
            assert "2/3 round one" in stream.getvalue()
            assert "3/10" in stream.getvalue()
    assert told_time(3723.9) == "1:02:03"
