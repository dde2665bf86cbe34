"""What a report shows of single answers: top-1 by class, and the images that flip."""

from __future__ import annotations

from typing import Any

from blockfit.evaluation.answers import Answers, ClassFigures
from blockfit.fit.intervals import paired_drop
from blockfit.units import percent

View = dict[str, Any]

MOST = 12
"""Classes that lose most, shown as bars."""


def classes_view(answers: Answers) -> View:
    """All classes as rows, those that lose most first; the worst as bars."""
    classes = (one for one in answers.classes if one.images > 0)
    rows = sorted(classes, key=lambda one: (_change(one), one.name))
    losing = [one for one in rows if _change(one) < 0]
    gaining = [one for one in rows if _change(one) > 0]
    words = (
        f"Of {len(rows)} classes, {len(losing)} lose, {len(gaining)} gain and "
        f"{len(rows) - len(losing) - len(gaining)} stay."
    )
    return {
        "words": words,
        "worst": [
            {
                "name": one.name,
                "before": f"{100 * one.before / one.images:.1f}",
                "after": f"{100 * one.after / one.images:.1f}",
                "words": _points(one),
            }
            for one in losing[:MOST]
        ],
        "rows": [
            [
                one.name,
                str(one.images),
                percent(one.before / one.images),
                percent(one.after / one.images),
                _points(one),
            ]
            for one in rows
        ],
    }


def _change(one: ClassFigures) -> float:
    return (one.after - one.before) / one.images


def _points(one: ClassFigures) -> str:
    return f"{100 * _change(one):+.1f} points"


def flips_view(answers: Answers, images: int) -> View | None:
    """The images that flip, the costliest first, and what became of each answer."""
    if not answers.flipped:
        return None
    words = f"The two models name another class first on {answers.flipped} of {images} images."
    if len(answers.flips) < answers.flipped:
        words += f" The {len(answers.flips)} costliest are listed."
    labelled = [one for one in answers.flips if one.label is not None]
    if labelled and len(answers.flips) == answers.flipped:
        worse = sum(one.before == one.label for one in labelled)
        better = sum(one.after == one.label for one in labelled)
        drop = paired_drop(worse, better, images).in_points()
        words += (
            f" {worse} were right and are wrong now, {better} were wrong and are right now: "
            f"{drop.value:.2f} points lost ({drop.low:.2f} to {drop.high:.2f})."
        )
    return {"words": words, "rows": answers.flips}
