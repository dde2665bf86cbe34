"""The plan that meets a budget: one function per kind of budget, in tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from blockfit import processes as ranks
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.search.budget import Budget
from blockfit.search.cuts import Share
from blockfit.search.loss_budget import Judge, Verdict, furthest
from blockfit.search.plan_judge import Point
from blockfit.search.session import Session
from blockfit.search.solve import Solution
from blockfit.search.span_search import most_removed

SHARES = (0.97, 0.94, *(share / 100 for share in range(90, 24, -4)))
"""Parts of the parameters that may remain, tried in turn under a budget of loss."""


def reach(session: Session, budget: Budget, judge: Judge | None = None) -> Point:
    """The plan of smallest held-out loss that meets ``budget``.

    Raises:
        BlockfitError: where no plan does; the message says what can be reached.
    """
    session.recipe.check_use(f"{budget.kind}=", protect=session.protected)
    if budget.kind == "flops" and session.sizes.flops is None:
        raise BlockfitError(f"{session.sizes.warnings()[0]}; use remove, params or latency")
    if session.recipe.baseline is not None:
        return session.published(budget, session.recipe.baseline)
    if budget.kind != "remove" and session.narrows():
        return BY_CUTS[budget.kind](session, budget, judge)
    session.check_chain()
    return BY_BLOCKS[budget.kind](session, budget, judge)


def _size_by_cuts(session: Session, budget: Budget, judge: Judge | None) -> Point:
    share = Share(budget.kind, budget.value)
    session.cuts.check_reach(share)
    return session.cuts.best_point(share)


def _latency_by_cuts(session: Session, budget: Budget, judge: Judge | None) -> Point:
    cuts = session.cuts
    return cuts.point(cuts.plan_for_latency(budget.value, partial(_ratio, session)))


def _loss_by_cuts(session: Session, budget: Budget, judge: Judge | None) -> Point:
    assert judge is not None, "a budget of loss needs a judge"
    cuts = session.cuts

    def solve(share: float) -> Solution:
        return cuts.solve(cuts.plan(Share("params", share)))

    def decide(solution: Solution) -> Verdict:
        session.say(f"judging {budget}")
        return judge.verdict(solution)

    smallest = cuts.smallest(Share("params", 1.0))
    found = furthest([share for share in SHARES if share > smallest], solve, decide)
    if found.solved is None:
        what = f"leaving {SHARES[0]:.0%} of the parameters"
        raise judge.refusal(what, found.verdicts[SHARES[0]])
    return cuts.point(found.solved.plan, found.solved)


def _count_of_blocks(session: Session, budget: Budget, judge: Judge | None) -> Point:
    size = int(budget.value)
    return session.search(size if session.recipe.contiguous else None).solved(size)


def _size_of_blocks(session: Session, budget: Budget, judge: Judge | None) -> Point:
    sizes, depth = session.sizes, session.setting.blocks.depth
    largest = most_removed(depth, session.protected)
    counts = [n for n in range(1, largest + 1) if _may_meet(session, budget, n)]
    if not counts:
        raise BlockfitError(
            f"{budget} cannot be reached even with {largest} of {depth} blocks removed; ask for "
            "more"
        )
    search, smallest = session.search(), 1.0

    def fits(plan: Plan) -> bool:
        return sizes.known_fraction(plan, budget.kind) <= budget.value + 1e-9

    for count in counts:
        left = [sizes.known_fraction(plan, budget.kind) for plan in search.proposals(count)]
        smallest = min([smallest, *left])
        point = search.solved_where(count, fits)
        if point is not None:
            return point
    raise BlockfitError(
        f"{budget} cannot be reached: with {search.largest} blocks removed, the smallest "
        f"model has {smallest:.1%}; ask for more"
    )


def _latency_of_blocks(session: Session, budget: Budget, judge: Judge | None) -> Point:
    search, ratio = session.search(), 1.0
    most = Budget("flops", min(1.0, budget.value * 1.1))
    for count in range(1, search.largest + 1):
        if not _may_meet(session, most, count):
            continue
        point = search.solved(count)
        ratio = _ratio(session, point.solution)
        session.say(f"{count} blocks: latency {ratio:.1%} of the original's")
        if ratio <= budget.value:
            return point
    raise BlockfitError(
        f"{budget} cannot be reached on this machine: with {search.largest} blocks removed, "
        f"the latency is {ratio:.1%} of the original's; ask for more"
    )


def _loss_of_blocks(session: Session, budget: Budget, judge: Judge | None) -> Point:
    assert judge is not None, "a budget of loss needs a judge"
    search = session.search()

    def decide(point: Point) -> Verdict:
        session.say(f"{point.removed} blocks: judging {budget}")
        return judge.verdict(point.solution)

    found = furthest(range(1, search.largest + 1), search.solved, decide)
    if found.solved is None:
        raise judge.refusal("removing one block", found.verdicts[1])
    return found.solved


def _may_meet(session: Session, budget: Budget, count: int) -> bool:
    """Whether removing the ``count`` largest blocks for nothing would meet a budget of size."""
    least = session.sizes.least(count, budget.kind)
    return least is None or least <= budget.value + 1e-9


def _ratio(session: Session, solution: Solution) -> float:
    """Latency over the original's, measured by the first of several processes."""
    return float(ranks.agreed(partial(session.latency_ratio, solution)))


Way = Callable[[Session, Budget, Judge | None], Point]

BY_CUTS: dict[str, Way] = {
    "params": _size_by_cuts,
    "flops": _size_by_cuts,
    "latency": _latency_by_cuts,
    "max_kl": _loss_by_cuts,
    "max_drop": _loss_by_cuts,
}
"""Ways to a budget where parts of blocks may be narrowed."""

BY_BLOCKS: dict[str, Way] = {
    "remove": _count_of_blocks,
    "params": _size_of_blocks,
    "flops": _size_of_blocks,
    "latency": _latency_of_blocks,
    "max_kl": _loss_of_blocks,
    "max_drop": _loss_of_blocks,
}
"""Ways to a budget by whole blocks alone."""
