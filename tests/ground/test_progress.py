"""Who hears how far a run is: the log, functions of the user's, a bar."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from blockfit.progress import Teller, told


class Bar:
    """Stands for tqdm's."""

    made: list[Bar]

    def __init__(self, **told: Any) -> None:
        Bar.made.append(self)
        self.n, self.total, self.lines, self.closed = 0, None, [told["desc"]], False

    def set_description_str(self, line: str) -> None:
        self.lines.append(line)

    def reset(self, total: int | None = None) -> None:
        self.n = 0
        self.total = self.total if total is None else total

    def update(self, more: int) -> None:
        self.n += more

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    Bar.made = []
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    return Bar.made


def test_a_bar_begins_anew_with_every_step_and_ends_with_the_run(bars: list[Bar]) -> None:
    with Teller(progress=True) as teller, teller:
        teller.say("one")
        teller.count(3, 10)
        teller.count(7, 10)
        assert (bars[0].n, bars[0].total) == (7, 10)
        teller.say("two")
        assert (bars[0].n, bars[0].total) == (0, None)
        teller.count(2, 5)
        assert (bars[0].n, bars[0].total) == (2, 5)
        teller.count(1, 5)
        assert bars[0].n == 1
    assert len(bars) == 1
    assert bars[0].lines == ["starting", "one", "two"]
    assert bars[0].closed
    teller.say("heard by nobody")


@pytest.mark.parametrize(
    ("terminal", "switch", "given", "shown"),
    [
        (True, None, {}, True),
        (False, None, {}, False),
        (True, "0", {}, False),
        (True, "0", {"progress": True}, True),
        (True, None, {"progress": False}, False),
        (True, None, {"progress": lambda done, total: None}, False),
        (True, None, {"say": lambda line: None}, False),
    ],
)
def test_a_bar_is_shown_where_somebody_looks_and_has_not_turned_it_off(
    terminal: bool,
    switch: str | None,
    given: dict[str, Any],
    shown: bool,
    bars: list[Bar],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("BLOCKFIT_PROGRESS", raising=False)
    if switch is not None:
        monkeypatch.setenv("BLOCKFIT_PROGRESS", switch)
    with Teller(**given):
        assert bool(bars) == shown


def test_lines_go_to_the_log_unless_somebody_listens(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    counted: list[tuple[int, int]] = []

    @told
    def work(amount: int, *, say: Any = None, progress: Any = None) -> int:
        say(f"working on {amount}")
        progress(1, amount)
        return amount

    with caplog.at_level(logging.INFO, "blockfit"):
        assert work(3) == 3
        work(4, say=heard.append, progress=lambda *n: counted.append(n))
    assert [(r.name, r.message) for r in caplog.records] == [("blockfit", "working on 3")]
    assert (heard, counted) == (["working on 4"], [(1, 4)])


def test_nothing_is_printed_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with Teller() as teller:
        teller.say("hidden")
        teller.count(1, 2)
    assert capfd.readouterr() == ("", "")
