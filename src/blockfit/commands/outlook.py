"""How far a run is as a whole: its steps by what they usually take, corrected by what they took.

The weights are usual shares of a run's time, as the demo model and a ViT-S take it on a CPU. Only
their ratios matter: what is left is scaled by what the finished steps have taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockfit.search.budget import Budget
    from blockfit.search.recipes import Recipe


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Args:
        begins: regular expression of the beginning of the line that announces it. Its groups
            ``number`` and ``of`` say how far it is, ``round`` in which of ``times`` rounds.
        weight: its usual share of the run.
        times: how often it comes.
    """

    begins: str
    weight: float
    times: int = 1


class Outlook:
    """How much of a run is done, and how long the rest takes.

    Args:
        steps: in their order; those that do not come are passed over.
        clock: seconds.
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float]) -> None:
        self._steps, self._clock = tuple(steps), clock
        self._total = sum(step.weight for step in steps)
        self._at, self._round, self._inside, self._inner = -1, 0, 0.0, 0.0
        self._began, self._counting = 0.0, False
        self.part = 0.0
        """How much of the run is done, from 0 to 1."""

    @property
    def number(self) -> int:
        """Of the present step, from 1; 0 before the first."""
        return self._at + 1

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self._steps)

    def say(self, line: str) -> None:
        """A line has announced what is done now; what belongs to no step is not counted."""
        self._counting = False
        for number in range(max(self._at, 0), len(self._steps)):
            step = self._steps[number]
            if (found := re.match(step.begins, line)) is None:
                continue
            if self._at < 0:
                self._began = self._clock()
            again = number == self._at
            told = {k: int(v) for k, v in found.groupdict().items() if v is not None}
            self._round = told.get("round", self._round + 2 if again else 1) - 1
            self._inside = (told["number"] - 1) / max(told["of"], 1) if "number" in told else 0.0
            self._inner, self._at, self._counting = 1 / max(told.get("of", 1), 1), number, True
            self.count(0, 1)
            return

    def count(self, done: int, total: int) -> None:
        """So much of the present step is done; a step that counts twice does not go back."""
        if self._at < 0 or not self._counting:
            return
        step = self._steps[self._at]
        inside = self._inside + self._inner * (done / total if total else 0.0)
        place = min((min(self._round, step.times - 1) + inside) / step.times, 1.0)
        before = sum(one.weight for one in self._steps[: self._at])
        self.part = max(self.part, (before + step.weight * place) / self._total)

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes; ``None`` before the first of several steps is done."""
        if self.part <= 0 or (self._at == 0 and len(self._steps) > 1):
            return None
        return (self._clock() - self._began) * (1 - self.part) / self.part


_CALIBRATED = (
    Step(r"original model on [\d,]+ fit images", 6),
    Step(r"original model on [\d,]+ held-out images", 2),
)
_CURVES = Step(r"narrowing: errors and effects", 35)
_SPANS = Step(r"effects of \d+ spans", 20)
_MOMENTS, _SCORED = Step(r"moments of \d+ spans", 6), Step(r"scoring single spans", 9)
_ENDED = (Step(r"final figures", 10), Step(r"saving to", 1))


def of_compress(recipe: Recipe, budget: Budget | None) -> tuple[Step, ...]:
    """The steps of a compression; without a budget the plan was written by hand."""
    cut = (*_CALIBRATED, _CURVES, *((_SPANS,) if "blocks" in recipe.cuts else ()))
    solved = Step(r"solving the plan on the fit|judging plan", 13)
    if budget is None:
        return (*_CALIBRATED, Step(r"solving", 6), *_ENDED)
    if budget.kind == "remove" or not recipe.narrows:
        tried = r"(?P<round>\d+) blocks?: trying plan (?P<number>\d+) of (?P<of>\d+)"
        sizes = (Step(tried, 14, int(budget.value)),) if budget.kind == "remove" else ()
        scored = (_SCORED,) if recipe.select == "effect" else ()
        return (*_CALIBRATED, _MOMENTS, *scored, *sizes, Step(r"\d+ blocks?: solving", 5), *_ENDED)
    if budget.kind == "latency":
        return (*cut, Step(r"latency", 10, 8), solved, *_ENDED)
    if budget.kind in ("max_kl", "max_drop"):
        return (*cut, Step(r"judging max_", 30, 6), solved, *_ENDED)
    kept = Step(r"solving .*on all", 14)
    if recipe.uniform:  # several plans are judged, then the best one is solved
        return (*cut, solved, kept, *_ENDED)
    return (*cut, kept, Step(solved.begins, 5), *_ENDED)


def of_sweep(recipe: Recipe, points: int) -> tuple[Step, ...]:
    """The steps of a sweep over parts of the parameters, or over numbers of blocks."""
    if recipe.narrows:
        shares = Step(r"\d+% of the parameters", 35.0 * points, points)
        return (*_CALIBRATED, _CURVES, shares)
    return (*_CALIBRATED, _MOMENTS, Step(r"size (?P<number>\d+) of (?P<of>\d+)", 60))


ANALYSIS = (Step(r"hidden states(, pass (?P<number>\d+) of (?P<of>\d+))?", 1),)


def of_pass(line: str, times: int = 1) -> tuple[Step, ...]:
    """One step, such as a single pass over the images, or several of one kind."""
    return (Step(re.escape(line), 1, times),)


def of_titles(titles: Sequence[str]) -> tuple[Step, ...]:
    """Steps that are told by their titles and take about as long."""
    return tuple(Step(re.escape(title), 1) for title in titles)
