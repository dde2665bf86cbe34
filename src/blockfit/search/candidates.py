"""Single spans are raced on held-out images; sets of them are put together by their sums."""

from __future__ import annotations

from collections.abc import Sequence

from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.search.held_out import HeldOut
from blockfit.search.solve import Solution

RACE_PASSES = 8.0
"""Work of the race of single spans, in plain passes over the held-out images."""


def race(
    held_out: HeldOut,
    candidates: Sequence[Solution],
    passes: float = RACE_PASSES,
    failed: dict[Plan, str] | None = None,
) -> dict[Replacement, float]:
    """Score single-span solutions by their effect on the output, spending most on the best.

    All candidates are scored on the first batch of held-out images; then, round by round, the
    better half of each span length goes on to the next batches, until ``passes`` plain passes
    over the held-out images are spent. A candidate runs only the blocks after its span.

    Args:
        passes: what may be spent.
        failed: the plans of candidates that cannot be run are put here, with the reason.

    Returns:
        replacement → effect (``Fidelity.effect``) on the images that it was run on, for every
        candidate that can be run.
    """
    failed = {} if failed is None else failed
    left = passes * len(held_out)
    entries = {c.plan.replacements[0]: c for c in candidates}
    totals: dict[Replacement, tuple[float, int]] = dict.fromkeys(entries, (0.0, 0))
    alive = list(entries)
    depth = held_out.blocks.depth
    price = {entry: held_out.cost(candidate) for entry, candidate in entries.items()}
    batch = 0
    while alive and batch < len(held_out.sizes):
        images = held_out.sizes[batch]
        cost = sum(images * price[e] for e in alive)
        while batch > 0 and cost > left:
            halved = _better_half(alive, totals)
            if len(halved) == len(alive):
                return _effects(totals)
            alive = halved
            cost = sum(images * price[e] for e in alive)
        scores = held_out.trials([entries[entry] for entry in alive], failed, [batch])
        for entry, score in zip(alive, scores, strict=True):
            if score is None:
                del totals[entry]
                continue
            total, n = totals[entry]
            totals[entry] = (total + score.feature_relative_error * images, n + images)
        alive = [entry for entry in alive if entry in totals]
        left -= cost
        batch += 1
        if len(alive) > 2 * depth:
            alive = _better_half(alive, totals)
    return _effects(totals)


def _effects(totals: dict[Replacement, tuple[float, int]]) -> dict[Replacement, float]:
    return {entry: (total / max(n, 1)) ** 2 for entry, (total, n) in totals.items()}


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
