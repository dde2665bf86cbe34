"""Solving one plan and judging it on held-out images: the last two steps of every search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from blockfit.fit.plan import Plan, Replacement
from blockfit.progress import Progress, silent
from blockfit.search.fidelity import Fidelity
from blockfit.search.held_out import HeldOut, MapError
from blockfit.search.solve import Choices, Options, Solution, solve
from blockfit.search.states import TracedImages


@dataclass(frozen=True)
class Point:
    """One solved plan of the frontier.

    Args:
        map_errors: local held-out error of each map beside identity's.
        top1: of the model's own head on the held-out images; ``None`` without their labels.
    """

    solution: Solution
    fidelity: Fidelity
    map_errors: tuple[MapError, ...]
    top1: float | None = None

    @property
    def removed(self) -> int:
        """Blocks removed."""
        return len(self.solution.plan.removed_blocks)


class PlanJudge:
    """Solves plans on the fit images and judges them on held-out ones.

    Args:
        precision: solved values are rounded to what this dtype can hold; ``None`` keeps them.
    """

    def __init__(
        self,
        originals: TracedImages,
        held_out: HeldOut,
        options: Options,
        progress: Progress = silent,
        precision: torch.dtype | None = None,
    ) -> None:
        self.originals, self.held_out, self.options = originals, held_out, options
        self._progress, self._precision = progress, precision

    @cached_property
    def _all(self) -> TracedImages:
        """The fit images and the held-out ones."""
        return self.originals.with_more(self.held_out.views)

    def solve(self, plan: Plan, choices: Choices | None = None) -> Solution:
        """The plan solved on the fit images; ``choices`` as in ``solve.solve``."""
        return self._solved(self.originals, plan, choices)

    def solve_on_all(self, plan: Plan, choices: Choices | None = None) -> Solution:
        """The plan solved on the fit images and the held-out ones."""
        return self._solved(self._all, plan, choices)

    def _solved(self, images: TracedImages, plan: Plan, choices: Choices | None) -> Solution:
        solution = solve(images, plan, self.options, self._progress, choices=choices)
        return self.rounded(solution)

    def rounded(self, solution: Solution) -> Solution:
        """The solution in the precision of the model."""
        if self._precision is None:
            return solution
        return solution.rounded(self._precision, self.originals.hold)

    def point(self, plan: Plan, choices: Choices | None = None) -> Point:
        """Solve a plan on the fit images and judge it; maps worse than identity are replaced by it.

        What comes after a replaced map is solved and judged again.

        Args:
            choices: what stays of narrowed parts, where another solution knows it.
        """
        while True:
            solution = self.solve(plan, choices)
            fidelity, errors, top1 = self.held_out.judge(solution)
            worse = {e.span for e in errors if e.error > e.identity_error}
            if not worse:
                return Point(solution, fidelity, tuple(errors), top1)
            changed = [
                Replacement(entry.span, "identity") if str(entry.span) in worse else entry
                for entry in plan
            ]
            plan = Plan(tuple(changed), plan.narrowings)
