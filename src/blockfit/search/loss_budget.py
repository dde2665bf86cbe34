"""Budgets of loss: how far plans may go, by bounds on images that judge nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from blockfit.arguments import at_least
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.fit.intervals import (
    CONFIDENCE,
    drop_above,
    images_for,
    mean_above,
    mean_interval,
    paired_drop,
)
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks
from blockfit.models.forward import placed
from blockfit.models.head import Observation, observe
from blockfit.progress import Progress, silent
from blockfit.search.budget import Budget
from blockfit.search.final import (
    APART,
    NOTHING,
    Outcomes,
    Parts,
    labels_of_head,
    outcomes,
)
from blockfit.search.solve import Solution

FIRST_LOOK = 256
"""Images after which a plan may be decided on for the first time; then after twice as many."""

EARLY = 0.2
"""Part of the error that looks before the last one may make together: who looks often and stops
where it suits errs more often."""

HOPELESS = 0.98
"""Confidence of the interval that a budget lies below where a plan is given up early."""

FEWEST_FOR_KL = 10
"""Images that the bound of a mean takes at least; fewer have no spread to speak of."""

Size = TypeVar("Size")
Solved = TypeVar("Solved")


@dataclass(frozen=True)
class Verdict:
    """Whether a plan keeps a budget of loss.

    Args:
        value: the loss on the images: nats, or points of top-1.
        bound: the upper end of its one-sided interval.
        confidence: of the bound.
    """

    kept: bool
    value: float
    bound: float
    images: int
    confidence: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def check_images(budget: Budget, parts: Parts, force: bool = False) -> None:
    """Refuse a budget that the images cannot decide on, before any of them is decoded."""
    if force or parts.judge is None:
        return
    there, needed = len(parts.judge.positions), fewest_images(budget)
    if there >= needed:
        return
    if math.isinf(needed):
        raise BlockfitError(
            f"{budget} cannot be shown on any number of images; allow more than 0, or give "
            "force_budget=True to go by what the images at hand say"
        )
    whole = parts.whole
    own = len(whole.positions)
    total = own + len(whole.beyond)
    enough = rounded_up(max(min(own, 512) + 1.5 * needed, min(own, 512) / (1 - 2 * APART)))
    labelled = "labelled " if budget.kind == "max_drop" else ""
    raise BlockfitError(
        f"{budget} takes at least {needed:.0f} {labelled}images beside those of the calibration "
        f"and of the final figures, and of the {total} that were given {there} are left; give "
        f"{enough} or more, allow a larger loss, or give force_budget=True to go by what the "
        f"{there} say"
    )


def fewest_images(budget: Budget) -> float:
    """How many images it takes to show that a budget is kept where next to nothing changes."""
    if budget.value <= 0:
        return math.inf
    return images_for(budget.value / 100) if budget.kind == "max_drop" else FEWEST_FOR_KL


def rounded_up(count: float) -> int:
    """To two digits: nobody is asked for 1,487 images."""
    unit = 10 ** max(math.floor(math.log10(count)) - 1, 0)
    return math.ceil(count / unit) * unit


class Judge:
    """Decides whether plans keep a budget of loss, on as many images as each decision takes.

    Every plan is judged on the same images, beside the original. A look at some of them may end
    it: where the upper end of the interval keeps the budget, or the lower end does not.

    Args:
        budget: ``max_kl`` or ``max_drop``.
        images: that judge and do nothing else.
        force: go by the loss that is measured instead of the bound.

    Raises:
        BlockfitError: where the model has no head, or points are asked for without labels.
    """

    def __init__(
        self,
        budget: Budget,
        model: nn.Module,
        blocks: Blocks,
        images: Images,
        seed: int = 0,
        force: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.budget, self.model, self.blocks, self.images = budget, model, blocks, images
        self.seed, self.force, self._progress = seed, force, progress
        self._points = budget.kind == "max_drop"
        self._ends = _ends(len(images.positions))
        self._original: list[dict[int, Observation]] = [{} for _ in self._ends]
        self.decided: dict[Plan, Verdict] = {}
        """The verdicts so far."""
        self._check_head()

    def _check_head(self) -> None:
        first = next(self.images.batches(), None)
        if first is None:
            raise BlockfitError("none of the images that judge can be read; give others")
        if self._points and first.labels is None:
            labelled = (batch for batch in self.images.batches() if batch.labels is not None)
            first = next(labelled, first)
        seen = observe(self.model, self.blocks, placed(self.model, first.inputs))
        labels = labels_of_head(seen, first.labels, self.images)
        if seen.logits is None:
            images = "labelled images of the classes of the model's own head"
            needs = images if self._points else "a model with a head"
            raise BlockfitError(
                f"{self.budget.kind} needs {needs}, and none is recognised ({seen.no_head}); "
                "use remove, params or flops"
            )
        if self._points and labels is None:
            raise BlockfitError(
                "max_drop needs labelled images of the classes of the model's own head "
                f"({self.images.labels_line or 'these have no labels'}); give such images or use "
                "max_kl"
            )

    def verdict(self, solution: Solution) -> Verdict:
        """Whether the original with ``solution`` in it keeps the budget."""
        small = solution.built(self.model, self.blocks, own=False)
        seen, start = NOTHING, 0
        for look, stop in enumerate(self._ends):
            part = self.images.between(start, stop)
            found = outcomes(
                self.model, small, self.blocks, part, self._progress, self._original[look]
            )
            seen, start = seen.joined(found), stop
            verdict = self._of(seen, self._confidence(look))
            if verdict.kept or self._hopeless(seen):
                break
        self.decided[solution.plan] = verdict
        return verdict

    def _confidence(self, look: int) -> float:
        """Of the bound at one look; all looks together err as often as one of ``CONFIDENCE``."""
        error, looks = 1 - CONFIDENCE, len(self._ends)
        if looks == 1:
            return CONFIDENCE
        return 1 - error * (1 - EARLY if look == looks - 1 else EARLY / (looks - 1))

    def _of(self, seen: Outcomes, confidence: float) -> Verdict:
        last = len(seen) >= len(self.images)
        if self._points:
            count = seen.labelled
            if not count:
                return Verdict(False, math.inf, math.inf, 0, confidence)
            worse, better = seen.changes
            value = 100 * (worse - better) / count
            bound = 100 * drop_above(worse, better, count, confidence)
        else:
            losses = seen.column("kl").numpy()
            count, value = len(losses), float(losses.mean())
            bound = mean_above(losses, self.seed, confidence)
        kept = last and value <= self.budget.value if self.force else bound <= self.budget.value
        return Verdict(kept, value, bound, count, confidence)

    def _hopeless(self, seen: Outcomes) -> bool:
        if self._points:
            worse, better = seen.changes
            low = 100 * paired_drop(worse, better, max(seen.labelled, 1), HOPELESS).low
        else:
            low = mean_interval(seen.column("kl").numpy(), self.seed, HOPELESS).low
        return low > self.budget.value

    def refusal(self, what: str, verdict: Verdict) -> BlockfitError:
        """What to tell where not even the gentlest plan keeps the budget."""
        unit, limit = " points" if self._points else "", self.budget.value
        if not verdict.images:
            return BlockfitError(
                f"the labels of the {len(self.images)} images that judge {self.budget} are not of "
                "the classes of the model's own head; give such images or use max_kl"
            )
        if verdict.value > limit or self.force:
            return BlockfitError(
                f"{self.budget} cannot be kept: {what} costs {verdict.value:.3g}{unit} already, "
                f"on {verdict.images} images; ask for more"
            )
        gap = max(limit - verdict.value, 0.02 * limit)
        count = rounded_up(verdict.images * ((verdict.bound - verdict.value) / gap) ** 2)
        return BlockfitError(
            f"{self.budget} cannot be shown on {verdict.images} images: {what} costs "
            f"{verdict.value:.3g}{unit} on them, and up to {verdict.bound:.3g} remain possible "
            f"({verdict.confidence:.0%}, one-sided); it takes about {count} images that judge, a "
            "larger budget, or force_budget=True"
        )


@dataclass(frozen=True)
class Judged:
    """What is kept of a plan's outcomes, to decide on budgets of loss later, without images.

    Args:
        images: on which the plan was looked at.
        labelled: how many of them have a label of the head's classes.
        worse: labelled images that only the original answers rightly.
        better: those that only the small model does.
        kl: mean KL from the original; ``None`` without a head.
        kl_bound: the upper end of its one-sided interval.
        apart: whether the images are others than those of the final figures.

    Raises:
        BlockfitError: where more answers have changed than there are labels.
    """

    images: int
    labelled: int
    worse: int
    better: int
    kl: float | None
    kl_bound: float | None
    apart: bool

    def __post_init__(self) -> None:
        at_least(0, images=self.images, worse=self.worse, better=self.better)
        if self.worse + self.better > self.labelled:
            raise BlockfitError("more answers have changed than there are labels")

    @classmethod
    def of(cls, found: Outcomes, apart: bool, seed: int = 0) -> Judged:
        """Count outcomes."""
        losses = found.column("kl").numpy()
        kl = None if math.isnan(losses.sum()) else float(losses.mean())
        bound = None if kl is None else mean_above(losses, seed)
        return cls(len(found), found.labelled, *found.changes, kl, bound, apart)

    def verdict(self, budget: Budget, force: bool = False) -> Verdict | None:
        """Whether the plan keeps a budget; ``None`` where that is not known."""
        if budget.kind == "max_drop":
            if not self.labelled:
                return None
            value = 100 * (self.worse - self.better) / self.labelled
            bound, count = 100 * drop_above(self.worse, self.better, self.labelled), self.labelled
        elif self.kl is None or self.kl_bound is None:
            return None
        else:
            value, bound, count = self.kl, self.kl_bound, self.images
        kept = (value if force else bound) <= budget.value
        return Verdict(kept, value, bound, count, CONFIDENCE)


def beyond_bound(budget: Budget, verdict: Verdict) -> list[str]:
    """What to tell where a plan was taken although its bound does not keep the budget."""
    if verdict.bound <= budget.value:
        return []
    unit = " points" if budget.kind == "max_drop" else ""
    return [
        f"{budget} is kept by what {verdict.images} images say, {verdict.value:.3g}{unit}, but up "
        f"to {verdict.bound:.3g} remain possible ({verdict.confidence:.0%}, one-sided)"
    ]


def _ends(count: int) -> list[int]:
    """After how many images a plan may be decided on: ``FIRST_LOOK``, twice as many, … all."""
    ends = []
    end = FIRST_LOOK
    while 3 * end < 2 * count:
        ends.append(end)
        end *= 2
    return [*ends, count]


@dataclass(frozen=True)
class Furthest(Generic[Size, Solved]):
    """How far plans may go.

    Args:
        size: of the last plan that keeps the budget; ``None`` where none does.
        solved: that plan.
        verdicts: of every size that was tried.
    """

    size: Size | None
    solved: Solved | None
    verdicts: dict[Size, Verdict] = field(default_factory=dict)


def furthest(
    sizes: Sequence[Size],
    solve: Callable[[Size], Solved],
    judge: Callable[[Solved], Verdict],
) -> Furthest[Size, Solved]:
    """The last of ``sizes`` whose plan keeps the budget, by trying few of them.

    The first, then every second further on is tried until one fails; then the gap is halved. Loss
    is taken to grow along ``sizes``.

    Args:
        sizes: from the gentlest on: blocks to remove, or parts of the parameters that remain.
        solve: makes the plan of a size.
        judge: decides on it.
    """
    verdicts: dict[Size, Verdict] = {}
    best: tuple[Size, Solved] | None = None
    low, high, at = -1, len(sizes), 0
    while low + 1 < high:
        solved = solve(sizes[at])
        verdicts[sizes[at]] = judge(solved)
        if verdicts[sizes[at]].kept:
            low, best = at, (sizes[at], solved)
        else:
            high = at
        onwards = min(2 * low + 2, len(sizes) - 1)
        at = onwards if high == len(sizes) else (low + high) // 2
    size, found = best if best is not None else (None, None)
    return Furthest(size, found, verdicts)
