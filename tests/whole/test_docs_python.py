"""The page of ten things: each in three lines or fewer; ``test_docs_run`` runs them."""

from __future__ import annotations

import re
from itertools import pairwise

from docs_pages import ROOT, blocks_of

PAGE = ROOT / "docs" / "python.md"


def test_there_are_ten_things_and_each_takes_three_lines_or_fewer() -> None:
    text = PAGE.read_text("utf-8")
    starts = [
        (text.count("\n", 0, found.start()), found[1])
        for found in re.finditer(r"^## (\d+)\. ", text, re.MULTILINE)
    ]
    end = text.count("\n", 0, text.index("## More budgets"))
    assert [number for _, number in starts] == [str(n) for n in range(1, 11)]
    lines = [start for start, _ in starts] + [end]
    for first, last in pairwise(lines):
        blocks = [b for b in blocks_of(PAGE) if first < b.line <= last]
        assert len(blocks) == 1
        assert blocks[0].why_not is None
        assert 1 <= sum(map(bool, blocks[0].text.splitlines())) <= 3
