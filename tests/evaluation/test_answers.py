"""Answers image by image, counted and sorted."""

from __future__ import annotations

from collections import Counter

from blockfit.evaluation.answers import MOST_FLIPS, answers_of


def test_all_flips_are_counted_and_the_costliest_named() -> None:
    rows = [(str(i), -1, 0, 1, float(i % 7)) for i in range(MOST_FLIPS + 50)]
    found = answers_of(rows, ["cat"])
    assert found.flipped == MOST_FLIPS + 50
    assert [flip.cost for flip in found.flips] == sorted(
        (row[4] for row in rows), reverse=True
    )[:MOST_FLIPS]  # fmt: skip
    assert found.classes == ()
    assert Counter((f.label, f.before, f.after) for f in found.flips) == {
        (None, "cat", "class 1"): MOST_FLIPS
    }
