"""Choosing what goes: candidates are raced, plans are proposed by sums and decided by forwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from blockfit import processes as ranks
from blockfit.errors import BlockfitError, first_line
from blockfit.fit.closed_form import RIDGE, fit_map, identity_error
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Plan, Replacement, Span, runs_of, spans_up_to
from blockfit.models.forward import FORWARD_ERRORS
from blockfit.progress import Progress, Say, silent
from blockfit.search.candidates import cheapest, race
from blockfit.search.held_out import HeldOut, left_out
from blockfit.search.plan_judge import PlanJudge, Point
from blockfit.search.prefixes import Beginnings
from blockfit.search.recipes import Recipe
from blockfit.search.solve import Options, Solution, solve
from blockfit.search.spill import GroupedMoments
from blockfit.search.states import TracedImages

PROPOSALS = 6
"""Plans per size that are refitted and run; half as many where more than half of the blocks go."""

FIRST_IMAGES = 48
"""Held-out images on which all proposals are run; only the better half sees the others."""

JUDGE_IMAGES = 96
"""Images, beside the held-out ones, on which the two best proposals are judged again: of the fit
images those that quick refits have not seen."""

QUICK_IMAGES = 128
"""Images on which proposals are refitted; the best is solved on all, repair included."""

RANK_SLACK = 0.05
"""How much worse than the best rank a smaller one may score and still be taken."""


def most_removed(depth: int, protected: Iterable[int] = ()) -> int:
    """The most blocks that can go: all but two, and no protected one."""
    return min(depth - 2, depth - len(set(protected)))


def check_removed(size: int, depth: int, protected: Collection[int] = ()) -> None:
    """Refuse a number of blocks that cannot go."""
    largest = most_removed(depth, protected)
    if largest < 1:
        few = f"the model has {depth} blocks, and two must stay"
        raise BlockfitError(few if depth < 3 else "every block is protected; protect fewer")
    if not 1 <= size <= largest:
        why = f" and {len(protected)} are protected" if protected else ""
        raise BlockfitError(
            f"cannot remove {size} blocks: the model has {depth}, two must stay{why}; "
            f"ask for 1 to {largest}"
        )


class Search:
    """Finds the best plan for every size from one calibration.

    Args:
        moments: of all spans up to ``recipe.longest``.
        seed: for ``select="random"``.
        precision: solved values are rounded to what this dtype can hold; ``None`` keeps them.
    """

    def __init__(
        self,
        originals: TracedImages,
        held_out: HeldOut,
        moments: Moments | GroupedMoments,
        recipe: Recipe,
        protected: Iterable[int] = (),
        seed: int = 0,
        say: Say = silent,
        progress: Progress = silent,
        precision: torch.dtype | None = None,
    ) -> None:
        self.originals, self.held_out, self.moments = originals, held_out, moments
        self.recipe, self.protected, self.seed = recipe, frozenset(protected), seed
        self.depth = originals.blocks.depth
        self.quick = originals.part(QUICK_IMAGES)
        self._more: HeldOut | None = None
        self.scores: dict[Replacement, float] = {}
        self.tried: dict[Plan, float] = {}
        self.effects: dict[Plan, float] = {}
        self.best: dict[int, list[Plan]] = {}
        self.failed: dict[Plan, str] = {}
        """Candidates that were left out because they cannot be run, and why."""
        self.keep: Callable[[], None] = lambda: None
        """Called whenever ``state`` has something new."""
        self._say = say
        self.judge = PlanJudge(originals, held_out, recipe.options, progress, precision)

    @property
    def largest(self) -> int:
        """The most blocks that can go: all but two, and no protected one."""
        return most_removed(self.depth, self.protected)

    def solved(self, size: int) -> Point:
        """The best plan that removes ``size`` blocks, solved as it will be used.

        Raises:
            BlockfitError: where that many blocks cannot go.
        """
        check_removed(size, self.depth, self.protected)
        return self._first_solved(size, self.proposals(size))

    def solved_where(self, size: int, fits: Callable[[Plan], bool]) -> Point | None:
        """The same of the plans that ``fits`` is true of; ``None`` where it is of no proposal."""
        check_removed(size, self.depth, self.protected)
        plans = [plan for plan in self.proposals(size) if fits(plan)]
        return self._first_solved(size, plans) if plans else None

    def _first_solved(self, size: int, plans: Sequence[Plan]) -> Point:
        """The first plan that the model can be run with."""
        for plan in plans:
            self._say(f"{size} blocks: solving {plan}")
            with self._leaving_out(plan):
                return self.judge.point(plan)
        raise self._none_left()

    def state(self) -> dict[str, Any]:
        """What was found so far, as JSON values, to go on from after a stop."""
        return {
            "scores": [[entry.to_json(), score] for entry, score in self.scores.items()],
            "tried": [[plan.to_json(), loss] for plan, loss in self.tried.items()],
            "best": [[size, [p.to_json() for p in plans]] for size, plans in self.best.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        for entry, score in state.get("scores", []):
            self.scores[Replacement.from_json(entry)] = float(score)
        for plan, loss in state.get("tried", []):
            self.tried[Plan.from_json(plan)] = float(loss)
        for size, plans in state.get("best", []):
            self.best[int(size)] = [Plan.from_json(plan) for plan in plans]

    def proposals(self, size: int) -> list[Plan]:
        """Plans that remove ``size`` blocks, best first, by the recipe's selection."""
        if self.recipe.select != "effect":
            return [self._plan(self._selected(size))]
        if self.recipe.contiguous:
            spans = self._of_size(size)
            self._score(spans)
            return sorted((self._plan((s,)) for s in spans), key=self._summed)[:1]
        if not self.scores:
            self._say("scoring single spans")
            self._score(self._spans(self.recipe.longest))
            self.keep()
        for smaller in range(1, size + 1):
            if smaller not in self.best:
                self.best[smaller] = self._decide(smaller)
                self.keep()
        return self.best[size]

    def _kinds(self, span: Span) -> list[Replacement]:
        every = self.recipe.replacements(span, self.originals.blocks.width)
        return [entry for entry in every if Plan((entry,)) not in self.failed]

    def _spans(self, longest: int) -> list[Span]:
        spans = spans_up_to(self.depth, longest, self.protected)
        return [s for s in spans if len(s) <= self.largest and self._kinds(s)]

    def _score(self, spans: Sequence[Span]) -> None:
        options = replace(self.recipe.options, repair="none", refit=False)
        candidates = []
        for span in spans:
            for entry in self._kinds(span):
                if entry in self.scores:
                    continue
                plan = Plan((entry,))
                with self._leaving_out(plan):
                    candidates.append(self._single(entry, options))
        if candidates:
            self.scores.update(race(self.held_out, candidates, failed=self.failed))

    def _single(self, entry: Replacement, options: Options) -> Solution:
        """A candidate of one span."""
        if entry.map == "folded":
            return solve(self.quick, Plan((entry,)), options)
        ridge = RIDGE if options.ridge is None else options.ridge
        moments = self.moments.of(entry.span)
        return Solution(Plan((entry,)), (fit_map(entry, moments, ridge, options.prefix_weight),))

    @contextmanager
    def _leaving_out(self, plan: Plan) -> Iterator[None]:
        """Note why a plan cannot be tried, and go on without it.

        Only where one process does all: the others would wait for what this one leaves out.
        """
        try:
            yield
        except FORWARD_ERRORS as error:
            if ranks.count() > 1:
                raise
            self.failed[plan] = first_line(error)

    def warnings(self) -> list[str]:
        """Which candidates were left out because they cannot be run, and why."""
        return left_out(self.failed)

    def _none_left(self) -> BlockfitError:
        """Why no candidate is left."""
        plan, reason = next(iter(self.failed.items()))
        return BlockfitError(
            f"no candidate can be run; the first was {plan}: {reason}; name the blocks that must "
            "stay with protect"
        )

    def _plan(self, spans: Iterable[Span]) -> Plan:
        """The best scored kind of map for each span."""
        chosen = []
        for span in spans:
            kinds = self._kinds(span)
            if not kinds:
                raise BlockfitError(
                    f"span {span} cannot be folded and the recipe has no other map; "
                    "add identity to the maps"
                )
            scored = [e for e in kinds if e in self.scores]
            # Unscored spans (longer than the longest) take the richest kind of the recipe.
            best = min(scored, key=lambda e: self.scores[e], default=kinds[-1])
            if best.rank is not None and scored:
                # Of the low-rank maps, the smallest that loses next to nothing against the best.
                enough = (1 + RANK_SLACK) * self.scores[best]
                low = [e for e in scored if e.rank is not None and self.scores[e] <= enough]
                best = min(low, key=lambda e: e.rank or 0)
            chosen.append(best)
        return Plan(tuple(chosen))

    def _summed(self, plan: Plan) -> float:
        """The sum of its spans' scores; a span too long to be scored counts as its parts."""
        total = 0.0
        for entry in plan:
            start, stop = entry.span.start, entry.span.stop
            while start < stop:
                part = Span(start, min(start + self.recipe.longest, stop))
                known = [self.scores[e] for e in self._kinds(part) if e in self.scores]
                total += min(known, default=0.0)
                start = part.stop
        return total

    def _decide(self, size: int) -> list[Plan]:
        """Refit and run the most promising plans of one size; best first.

        All are run on some of the held-out images, the better half on the others, and the two
        best on further images.
        """
        pool = self._pool(size)
        options = replace(self.recipe.options, repair="none", refit=True)
        solved, beginnings = {}, Beginnings(pool)
        for number, plan in enumerate(pool):
            self._say(f"{size} blocks: trying plan {number + 1} of {len(pool)}")
            with self._leaving_out(plan):
                solved[plan] = solve(self.quick, plan, options, beginnings=beginnings)
        pool = list(solved)
        first: list[int] = []
        others: list[int] = []
        count = 0
        for batch, images in enumerate(self.held_out.sizes):
            (first if count < FIRST_IMAGES else others).append(batch)
            count += images
        totals = {plan: [0.0, 0.0, 0.0] for plan in pool}  # images, feature error, loss

        def run(plans: list[Plan], judge: HeldOut, batches: list[int] | None) -> None:
            scores = judge.trials([solved[plan] for plan in plans], self.failed, batches)
            for plan, found in zip(plans.copy(), scores, strict=True):
                if found is None:
                    plans.remove(plan)
                    continue
                total = totals[plan]
                total[0] += found.images
                total[1] += found.images * found.feature_relative_error
                total[2] += found.images * found.loss
                self.effects[plan] = (total[1] / total[0]) ** 2
                self.tried[plan] = total[2] / total[0]
            plans.sort(key=lambda plan: self.effects[plan])

        run(pool, self.held_out, first)
        better, rest = pool[: (len(pool) + 1) // 2], pool[(len(pool) + 1) // 2 :]
        if others and rest:
            run(better, self.held_out, others)
        best, rest = better[:2], better[2:] + rest
        if len(best) > 1 and (more := self._judges()) is not None:
            run(best, more, None)
        if not best + rest:
            raise self._none_left()
        return best + rest

    def _judges(self) -> HeldOut | None:
        """Fit images that quick refits have not seen; ``None`` where their states are not kept."""
        if self._more is None:
            self._more = HeldOut(self.originals.shown(1).after(self.quick, JUDGE_IMAGES))
        return self._more if self._more.sizes else None

    def _pool(self, size: int) -> list[Plan]:
        costs: dict[Span, float] = {}
        for entry, score in self.scores.items():
            costs[entry.span] = min(score, costs.get(entry.span, score))
        pool: dict[Plan, None] = {}
        most = PROPOSALS if size <= self.depth // 2 else PROPOSALS // 2
        for spans in cheapest(self.depth, size, costs, (most + 1) // 2):
            pool.setdefault(self._plan(spans))
        children: dict[Plan, None] = {}
        for parent in self.best.get(size - 1, [])[:2]:
            gone = set(parent.removed_blocks)
            for block in range(self.depth):
                if block not in gone and block not in self.protected:
                    spans = runs_of(gone | {block})
                    if all(self._kinds(s) for s in spans):
                        children.setdefault(self._plan(spans))
        for plan in sorted(children, key=self._summed):
            if len(pool) >= most:
                break
            pool.setdefault(plan)
        if not pool and self.failed:
            raise self._none_left()
        if not pool:
            raise BlockfitError(
                f"no plan removes {size} blocks with the maps {', '.join(self.recipe.maps)}; "
                "add another map or protect fewer blocks"
            )
        return list(pool)

    def _selected(self, size: int) -> tuple[Span, ...]:
        """Spans chosen without looking at the output: the baselines."""
        free = [b for b in range(self.depth) if b not in self.protected]
        how = self.recipe.select
        if self.recipe.contiguous:
            return (self._one_span(self._of_size(size)),)
        if how in ("first", "last"):
            return runs_of(free[:size] if how == "first" else free[-size:])
        if how == "random":
            drawn = np.random.default_rng(self.seed).choice(free, size=size, replace=False)
            return runs_of(int(b) for b in drawn)
        spans = [s for s in self._spans(self.recipe.longest) if s in self.moments.spans]
        costs = {s: self._distance(s) for s in spans}
        found = cheapest(self.depth, size, costs, 1)
        if not found:
            raise BlockfitError(f"no set of spans removes {size} blocks; remove fewer")
        return found[0]

    def _of_size(self, size: int) -> list[Span]:
        """Every single span that removes ``size`` blocks."""
        spans = [s for s in self._spans(size) if len(s) == size]
        if not spans:
            raise BlockfitError(
                f"no single span removes {size} blocks here; protect fewer blocks, "
                "remove fewer, or allow several spans (contiguous=)"
            )
        return spans

    def _one_span(self, spans: Sequence[Span]) -> Span:
        how = self.recipe.select
        if how in ("first", "last"):
            return spans[0 if how == "first" else -1]
        if how == "random":
            return spans[int(np.random.default_rng(self.seed).integers(len(spans)))]
        return min(spans, key=self._distance)

    def _distance(self, span: Span) -> float:
        if self.recipe.select == "angular":
            return self.moments.of(span).angle(span)[1]
        return identity_error(self.moments.of(span).regression(span)) / self.moments.width
