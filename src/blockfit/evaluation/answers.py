"""What two models answer, image by image: top-1 by class, and the images on which they part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from blockfit.models.head import Observation
from blockfit.search.fidelity import kl_divergence

MOST_FLIPS = 200
"""Images that are named, the costliest; all are counted."""

Answer = tuple[str, int, int, int, float]
"""Image, label (−1 for none), first class of the original and of the small model, KL in nats."""


@dataclass(frozen=True)
class ClassFigures:
    """One class of labelled images."""

    name: str
    images: int
    before: int
    after: int


@dataclass(frozen=True)
class Flip:
    """An image that the two models class differently.

    Args:
        label: its class; ``None`` where it has none.
        before: class that the original names first.
        after: class that the small model names first.
        cost: KL(original ‖ small) of this image, in nats.
    """

    image: str
    label: str | None
    before: str
    after: str
    cost: float


@dataclass(frozen=True)
class Answers:
    """What two models answered on the same images.

    Args:
        classes: those with labelled images, in the head's order; empty without labels.
        flips: images that are classed differently, the costliest first, ``MOST_FLIPS`` at most.
    """

    classes: tuple[ClassFigures, ...] = ()
    flips: tuple[Flip, ...] = ()
    flipped: int = 0


def answers_of_batch(
    before: Observation, after: Observation, labels: Tensor | None, names: Sequence[str]
) -> list[Answer]:
    """One answer per image of a batch; none where a model has no head.

    Args:
        labels: int64 (B,), numbers of the head's classes; others count as none.
    """
    if before.logits is None or after.logits is None:
        return []
    old, new = before.logits.cpu(), after.logits.cpu()
    known = [-1] * len(old) if labels is None else labels.tolist()
    firsts = zip(old.argmax(1).tolist(), new.argmax(1).tolist(), strict=True)
    costs = kl_divergence(old, new).tolist()
    return [
        (
            names[row] if row < len(names) else str(row),
            known[row] if 0 <= known[row] < old.shape[1] else -1,
            first,
            second,
            costs[row],
        )
        for row, (first, second) in enumerate(firsts)
    ]


def answers_of(rows: Iterable[Answer], names: Sequence[str] | None) -> Answers:
    """Sort out what ``answers_of_batch`` found."""
    counts: dict[int, list[int]] = {}
    flips: list[Answer] = []
    for row in rows:
        _, label, first, second, _ = row
        if label >= 0:
            count = counts.setdefault(label, [0, 0, 0])
            for place, hit in enumerate((True, first == label, second == label)):
                count[place] += hit
        if first != second:
            flips.append(row)
    flips.sort(key=lambda row: -row[4])

    def called(number: int) -> str:
        return names[number] if names and number < len(names) else f"class {number}"

    return Answers(
        tuple(ClassFigures(called(number), *counts[number]) for number in sorted(counts)),
        tuple(
            Flip(image, None if label < 0 else called(label), called(first), called(second), cost)
            for image, label, first, second, cost in flips[:MOST_FLIPS]
        ),
        len(flips),
    )
