"""Choosing what goes: candidates are raced, plans are proposed by sums and decided by forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from blockfit.errors import BlockfitError
from blockfit.fidelity import Fidelity
from blockfit.fit import RIDGE, fit_map, identity_error
from blockfit.heldout import HeldOut, MapError
from blockfit.moments import Moments
from blockfit.originals import Originals
from blockfit.recipes import Recipe
from blockfit.repair import Solution, solve
from blockfit.spans import Plan, Replacement, Span, runs_of, spans_up_to

RACE_PASSES = 9.0
"""Work of the race of single spans, in plain passes over the held-out images."""

PROPOSALS = 4
"""Plans per size that are refitted and run."""

QUICK_IMAGES = 128
"""Images on which proposals are refitted; the best is solved on all, repair included."""

RANK_SLACK = 0.05
"""How much worse than the best rank a smaller one may score and still be taken."""


@dataclass(frozen=True)
class Point:
    """One solved plan of the frontier.

    Args:
        solution: plan, maps and repaired weights.
        fidelity: on the held-out images.
        map_errors: local held-out error of each map beside identity's.
    """

    solution: Solution
    fidelity: Fidelity
    map_errors: tuple[MapError, ...]

    @property
    def removed(self) -> int:
        """Blocks removed."""
        return len(self.solution.plan.removed_blocks)


def race(
    held_out: HeldOut, candidates: Sequence[Solution], passes: float = RACE_PASSES
) -> dict[Replacement, float]:
    """Score single-span solutions by their effect on the output, spending most on the best.

    All candidates are scored on the first batch of held-out images; then, round by round, the
    better half of each span length goes on to the next batches, until ``passes`` plain passes
    over the held-out images are spent. A candidate runs only the blocks behind its span.

    Returns:
        replacement → mean loss over the images that it was run on, for every candidate.
    """
    left = passes * len(held_out)
    entries = {c.plan.replacements[0]: c for c in candidates}
    totals: dict[Replacement, tuple[float, int]] = dict.fromkeys(entries, (0.0, 0))
    alive = list(entries)
    depth = held_out.blocks.depth
    price = {entry: held_out.cost(candidate) for entry, candidate in entries.items()}
    batch = 0
    while alive and batch < len(held_out.traces):
        images = len(held_out.traces[batch].states[0])
        cost = sum(images * price[e] for e in alive)
        while batch > 0 and cost > left:
            halved = _better_half(alive, totals)
            if len(halved) == len(alive):
                return {e: total / max(n, 1) for e, (total, n) in totals.items()}
            alive = halved
            cost = sum(images * price[e] for e in alive)
        for entry in alive:
            loss = held_out.score(entries[entry], [batch]).loss
            total, n = totals[entry]
            totals[entry] = (total + loss * images, n + images)
        left -= cost
        batch += 1
        if len(alive) > 2 * depth:
            alive = _better_half(alive, totals)
    return {entry: total / max(n, 1) for entry, (total, n) in totals.items()}


def _better_half(
    alive: Sequence[Replacement], totals: dict[Replacement, tuple[float, int]]
) -> list[Replacement]:
    """The better half of each span length, at least one of each."""
    kept = []
    for length in sorted({len(e.span) for e in alive}):
        group = [e for e in alive if len(e.span) == length]
        group.sort(key=lambda e: totals[e][0] / max(totals[e][1], 1))
        kept += group[: (len(group) + 1) // 2]
    return kept


def cheapest(
    depth: int, size: int, costs: dict[Span, float], how_many: int
) -> list[tuple[Span, ...]]:
    """The sets of separate spans that remove ``size`` blocks with the smallest summed cost.

    Dynamic programming over blocks with the ``how_many`` best sets kept in every state. Spans that
    touch are not considered: one map does what two in a row do.
    """
    # best[n] of block l: sets over blocks l … depth − 1 that remove n blocks, cheapest first.
    ends: list[dict[int, list[tuple[float, tuple[Span, ...]]]]] = [{} for _ in range(depth + 2)]
    ends[depth] = ends[depth + 1] = {0: [(0.0, ())]}
    for start in reversed(range(depth)):
        options: dict[int, list[tuple[float, tuple[Span, ...]]]] = {
            n: list(sets) for n, sets in ends[start + 1].items()
        }
        for span, cost in costs.items():
            if span.start != start:
                continue
            for n, sets in ends[span.stop + 1 if span.stop < depth else depth].items():
                longer = [(c + cost, (span, *spans)) for c, spans in sets]
                options.setdefault(n + len(span), []).extend(longer)
        ends[start] = {n: sorted(sets)[:how_many] for n, sets in options.items() if n <= size}
    return [spans for _, spans in ends[0].get(size, [])]


def most_removed(depth: int, protected: Iterable[int] = ()) -> int:
    """The most blocks that can go: all but two, and no protected one."""
    return min(depth - 2, depth - len(set(protected)))


class Search:
    """Finds the best plan for every size from one calibration.

    Args:
        originals: the fit images as the original saw them.
        held_out: the judge.
        moments: of all spans up to ``recipe.longest``; ``None`` where only given plans are judged.
        recipe: maps, selection, refit and repair.
        protected: blocks that must stay.
        seed: for ``select="random"``.
        say: called with one line on what is being done.
        progress: called with blocks done and blocks in all while a plan is solved.
        precision: solved values are rounded to what this dtype can hold; ``None`` keeps them.
    """

    def __init__(
        self,
        originals: Originals,
        held_out: HeldOut,
        moments: Moments | None,
        recipe: Recipe,
        protected: Iterable[int] = (),
        seed: int = 0,
        say: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.originals, self.held_out, self._moments = originals, held_out, moments
        self.recipe, self.protected, self.seed = recipe, frozenset(protected), seed
        self.depth = originals.blocks.depth
        self.quick = originals.part(QUICK_IMAGES)
        self.scores: dict[Replacement, float] = {}
        self.tried: dict[Plan, float] = {}
        self.best: dict[int, list[Plan]] = {}
        self._say, self._progress = say or (lambda line: None), progress
        self._precision = precision

    @property
    def moments(self) -> Moments:
        """The sums that single spans are fitted from."""
        assert self._moments is not None, "this search judges given plans only"
        return self._moments

    @property
    def largest(self) -> int:
        """The most blocks that can go: all but two, and no protected one."""
        return most_removed(self.depth, self.protected)

    def solved(self, size: int, fits: Callable[[Plan], bool] | None = None) -> Point | None:
        """The best plan that removes ``size`` blocks, solved as it will be used.

        Args:
            size: blocks to remove.
            fits: what else a plan must meet (a budget of parameters or FLOPs); ``None`` comes back
                where no proposal of this size does.

        Raises:
            BlockfitError: where that many blocks cannot go.
        """
        self.check(size)
        proposals = [p for p in self.proposals(size) if fits is None or fits(p)]
        if not proposals:
            return None
        self._say(f"{size} blocks: solving {proposals[0]}")
        return self.point(proposals[0])

    def check(self, size: int) -> None:
        """Refuse a number of blocks that cannot go."""
        if not 1 <= size <= self.largest:
            why = f" and {len(self.protected)} are protected" if self.protected else ""
            raise BlockfitError(
                f"cannot remove {size} blocks: the model has {self.depth}, two must stay{why}; "
                f"ask for 1 to {self.largest}"
            )

    def point(self, plan: Plan) -> Point:
        """Solve a plan on all fit images and judge it; maps worse than identity are replaced."""
        while True:
            solution = self._solve(plan)
            errors = self.held_out.map_errors(solution)
            worse = {e.span for e in errors if e.error > e.identity_error}
            if not worse:
                break
            # What comes behind an exchanged map is solved anew, and judged anew.
            changed = [
                Replacement(entry.span, "identity") if str(entry.span) in worse else entry
                for entry in plan
            ]
            plan = Plan(tuple(changed))
        return Point(solution, self.held_out.score(solution), tuple(errors))

    def _solve(self, plan: Plan) -> Solution:
        solution = solve(self.originals, plan, self.recipe.options, self._progress)
        return solution if self._precision is None else solution.rounded(self._precision)

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
        for smaller in range(1, size + 1):
            if smaller not in self.best:
                self.best[smaller] = self._decide(smaller)
        return self.best[size]

    def _kinds(self, span: Span) -> list[Replacement]:
        return self.recipe.replacements(span, self.originals.blocks.width)

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
                if entry.map == "folded":
                    candidates.append(solve(self.quick, plan, options))
                else:
                    ridge = RIDGE if options.ridge is None else options.ridge
                    fitted = fit_map(entry, self.moments, ridge, options.prefix_weight)
                    candidates.append(Solution(plan, (fitted,)))
        if candidates:
            self.scores.update(race(self.held_out, candidates))

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
        """Refit and run the most promising plans of one size; best first."""
        pool = self._pool(size)
        for number, plan in enumerate(pool):
            self._say(f"{size} blocks: trying plan {number + 1} of {len(pool)}")
            options = replace(self.recipe.options, repair="none", refit=True)
            self.tried[plan] = self.held_out.score(solve(self.quick, plan, options)).loss
        return sorted(pool, key=lambda plan: self.tried[plan])

    def _pool(self, size: int) -> list[Plan]:
        costs: dict[Span, float] = {}
        for entry, score in self.scores.items():
            costs[entry.span] = min(score, costs.get(entry.span, score))
        pool: dict[Plan, None] = {}
        for spans in cheapest(self.depth, size, costs, PROPOSALS // 2):
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
            if len(pool) >= PROPOSALS:
                break
            pool.setdefault(plan)
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
                "remove fewer, or leave --contiguous away"
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
            return self.moments.angle(span)[1]
        return identity_error(self.moments.regression(span)) / self.moments.width
