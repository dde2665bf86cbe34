"""Tables and lines as text and as HTML."""

from __future__ import annotations

import sys

import pytest

from blockfit.errors import BlockfitError
from blockfit.summary import Summary, Table, frame

TABLE = Table.of(("", "before", "after"), [("top-1", "98.8%", "7%"), ("KL", "", "0.0123")], "Title")


def test_numbers_stand_under_one_another_and_words_at_the_left() -> None:
    assert TABLE.text().splitlines() == [
        "Title",
        "        before    after",
        "───────────────────────",
        "top-1    98.8%       7%",
        "KL               0.0123",
    ]


def test_what_looks_like_markup_is_shown_as_it_is_and_nothing_is_cut() -> None:
    long = "x" * 300
    text = Table.of(("", "[bold]n"), [("[/red] :smile:", "1"), (long, "2")]).text()
    assert "[bold]n" in text
    assert "[/red] :smile:" in text
    assert long in text


def test_a_notebook_gets_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich shows tables by itself in kernels of Jupyter, and would leave nothing to return."""
    text = TABLE.text()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert TABLE.text() == text


def test_a_title_wider_than_the_table_is_one_line() -> None:
    table = Table.of(("a", "b"), [("c", "1")], "A title that is wider than all its columns")
    assert table.text().splitlines()[0] == table.title


def test_html_shows_every_cell_and_runs_nothing() -> None:
    table = Table.of(("<script>", "n"), [("a & b", "1")], "<b>")
    page = Summary.of("x < y", ["  in", "  columns"], table)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<td>a &amp; b</td><td>1</td>" in page
    assert "<caption>&lt;b&gt;</caption>" in page
    assert "<div>x &lt; y</div>" in page
    assert "  in\n  columns</pre>" in page


def test_a_summary_reads_as_text_where_it_is_printed_or_shown() -> None:
    told = Summary.of("first", TABLE, warnings=["mind the gap"])
    assert str(told) == repr(told) == f"first\n{TABLE.text()}\nwarning: mind the gap"


def test_without_pandas_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BlockfitError, match=r"^to_frame\(\) needs pandas, .*blockfit\[notebook\]"):
        frame([{"a": 1}])
