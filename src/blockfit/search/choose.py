"""Choosing what goes under a budget: a knapsack over the parts of all blocks and over spans.

Effects of different cuts nearly add up while they are small (DESIGN: 4). For a price λ per unit of
cost, every part takes the width of least effect + λ · cost, and the chain of blocks is walked by
dynamic programming: a block is narrowed, or lies in a span that is replaced by a map. The smallest
λ that meets the budget is found by bisection; what it leaves over is given back where it helps.

Where a stock config has to say what is left, all MLPs have one width and spans leave no map: there
are few such plans, and for each number of blocks the widest one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from blockfit.fit.plan import Narrowing, Plan, Replacement
from blockfit.search.curves import Curve, key_of

BISECTIONS = 80

NEXT_TO_NOTHING = 0.01
"""Part of a plan's effect below which a span is not kept although the budget has room for it."""


@dataclass(frozen=True)
class Priced:
    """A span with its map as a choice."""

    entry: Replacement
    effect: float
    saved: float


@dataclass(frozen=True)
class Choice:
    """What a knapsack found."""

    plan: Plan
    effect: float
    saved: float


def choose(
    curves: Sequence[Curve],
    spans: Sequence[Priced],
    depth: int,
    to_save: float,
    units: Mapping[tuple[int, str], float] | None = None,
) -> Choice | None:
    """The cuts of least effect that take away at least ``to_save``.

    Args:
        curves: of the parts.
        to_save: parameters by default, or what ``units`` count.
        units: (block, part) → cost of one of its dimensions; its parameters by default.

    Returns:
        ``None`` where all that may go is not enough.
    """
    parts = [_Part(c, c.unit if units is None else units[key_of(c)]) for c in curves]
    by_block: list[list[int]] = [[] for _ in range(depth)]
    for number, part in enumerate(parts):
        by_block[part.curve.whole.block].append(number)

    def at(price: float) -> tuple[dict[int, int], list[Priced]]:
        return _walk(parts, by_block, spans, depth, price)

    def saved(picked: Mapping[int, int], gone: Sequence[Priced]) -> float:
        return sum(parts[n].saved[i] for n, i in picked.items()) + sum(s.saved for s in gone)

    low, high = 0.0, 1e-12
    while saved(*at(high)) < to_save:
        low, high = high, high * 16
        if high > 1e12:
            return None
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if low > 0 else high / 2
        low, high = (middle, high) if saved(*at(middle)) < to_save else (low, middle)
    picked, gone = at(high)
    _give_back(parts, picked, gone, saved(picked, gone) - to_save)
    narrowings = tuple(
        replace(parts[n].curve.whole, kept=parts[n].curve.widths[i])
        for n, i in picked.items()
        if i > 0
    )
    effect = sum(parts[n].effects[i] for n, i in picked.items()) + sum(s.effect for s in gone)
    plan = Plan(tuple(s.entry for s in gone), narrowings)
    return Choice(plan, float(effect), float(saved(picked, gone)))


class _Part:
    """A curve as arrays: what every width costs in effect and takes away."""

    def __init__(self, curve: Curve, unit: float) -> None:
        self.curve, self.effects = curve, np.array(curve.effects)
        self.saved = unit * (curve.whole.size - np.array(curve.widths))


def _walk(
    parts: Sequence[_Part],
    by_block: Sequence[Sequence[int]],
    spans: Sequence[Priced],
    depth: int,
    price: float,
) -> tuple[dict[int, int], list[Priced]]:
    """The best widths and spans at a price: a shortest path along the blocks.

    The path is walked twice side by side, with and without a block that was kept so far: a plan
    must leave one.
    """
    best = [int(np.argmin(part.effects - price * part.saved)) for part in parts]
    values = [float(p.effects[i] - price * p.saved[i]) for p, i in zip(parts, best, strict=True)]
    bare, total = [[0.0] + [np.inf] * depth, [np.inf] * (depth + 1)]
    taken: list[list[Priced | None]] = [[None] * (depth + 1) for _ in range(2)]
    ending: dict[int, list[Priced]] = {}
    for span in spans:
        ending.setdefault(span.entry.span.stop, []).append(span)
    for stop in range(1, depth + 1):
        own = sum(values[n] for n in by_block[stop - 1])
        total[stop] = min(bare[stop - 1], total[stop - 1]) + own
        for span in ending.get(stop, []):
            for path, through in zip((bare, total), taken, strict=True):
                value = path[span.entry.span.start] + span.effect - price * span.saved
                if value < path[stop]:
                    path[stop], through[stop] = value, span
    picked: dict[int, int] = {}
    gone: list[Priced] = []
    at, kept = depth, 1
    while at > 0:
        if (span_taken := taken[kept][at]) is None:
            picked |= {n: best[n] for n in by_block[at - 1]}
            at -= 1
            kept = int(total[at] <= bare[at])
        else:
            gone.append(span_taken)
            at = span_taken.entry.span.start
    return picked, gone


def _give_back(
    parts: Sequence[_Part], picked: dict[int, int], gone: list[Priced], room: float
) -> None:
    """Widen parts and keep spans, in place, while the budget stays met.

    Most effect for its cost first. A price alone leaves much where spans are all that saves:
    between two prices a plan may lose a block more than it need. A span that costs next to nothing
    goes all the same.
    """
    matters = NEXT_TO_NOTHING * (
        sum(parts[n].effects[i] for n, i in picked.items()) + sum(span.effect for span in gone)
    )
    while True:
        steps: list[tuple[float, float, int | Priced]] = []
        for n, i in picked.items():
            if i > 0:
                part = parts[n]
                cost = part.saved[i] - part.saved[i - 1]
                steps.append((part.effects[i] - part.effects[i - 1], cost, n))
        steps += [(span.effect, span.saved, span) for span in gone if span.effect >= matters]
        worth = [(effect / max(cost, 1e-12), cost, step) for effect, cost, step in steps]
        fitting = [one for one in worth if one[0] > 0 and one[1] <= room]
        if not fitting:
            return
        _, cost, step = max(fitting, key=lambda one: one[0])
        room -= cost
        if isinstance(step, Priced):
            gone.remove(step)
        else:
            picked[step] -= 1


def choose_uniform(
    curves: Sequence[Curve],
    spans: Sequence[Priced],
    depth: int,
    to_save: float,
    units: Mapping[tuple[int, str], float] | None = None,
    *,
    more_widths: Iterable[int] = (),
    says: Callable[[Plan], bool] = lambda plan: True,
) -> list[Choice]:
    """For every number of blocks that may go, the widest MLPs that meet a budget: one for all.

    Args:
        curves: of the MLPs; blocks can be narrowed only where all that are left have one.
        more_widths: to be tried beside those of the curves.
        says: whether a stock config can say a plan; asked last, since it takes time.

    Returns:
        the choices, that of least effect first; none where all that may go is not enough.
    """
    mlps = {curve.whole.block: curve for curve in curves}
    sizes = {curve.whole.size for curve in curves}
    widths: set[int] = set()
    if len(sizes) == 1:
        widths = {w for c in curves for w in c.widths} | set(more_widths)
    narrower = sorted((w for w in widths if w < max(sizes)), reverse=True)
    found: dict[int, Choice] = {}
    for width in (None, *narrower):
        blocks = [_at_width(mlps.get(i), width, units) for i in range(depth)]
        for count, path in _walk_uniform(blocks, spans, depth).items():
            if path.saved < to_save - 1e-12 or count in found or count == depth:
                continue
            choice = path.choice()
            if choice.plan and says(choice.plan):
                found[count] = choice
    return sorted(found.values(), key=lambda choice: choice.effect)


@dataclass(frozen=True)
class _Path:
    """Cuts up to some block, the last one first."""

    effect: float = 0.0
    saved: float = 0.0
    cut: Replacement | Narrowing | None = None
    before: _Path | None = None

    def then(self, effect: float, saved: float, cut: Replacement | Narrowing | None) -> _Path:
        return _Path(self.effect + effect, self.saved + saved, cut, self)

    def choice(self) -> Choice:
        cuts: list[Replacement | Narrowing] = []
        path: _Path | None = self
        while path is not None:
            cuts += [] if path.cut is None else [path.cut]
            path = path.before
        return Choice(Plan.of_cuts(cuts), self.effect, self.saved)


Step = tuple[float, float, Narrowing | None]
"""Effect and saving of a block that stays, and how it is narrowed."""


def _at_width(
    curve: Curve | None, width: int | None, units: Mapping[tuple[int, str], float] | None
) -> Step | None:
    """One block with its MLP at a width; whole where that is ``None``."""
    if width is None:
        return 0.0, 0.0, None
    if curve is None:
        return None
    unit = curve.unit if units is None else units[key_of(curve)]
    cut = replace(curve.whole, kept=width)
    effect = float(np.interp(-width, [-w for w in curve.widths], curve.effects))
    return effect, unit * (cut.size - width), cut


def _walk_uniform(
    blocks: Sequence[Step | None], spans: Sequence[Priced], depth: int
) -> dict[int, _Path]:
    """By the number of blocks that go, the path of least effect along them."""
    best: list[dict[int, _Path]] = [{0: _Path()}, *({} for _ in range(depth))]
    ending: dict[int, list[Priced]] = {}
    for span in spans:
        ending.setdefault(span.entry.span.stop, []).append(span)
    for stop in range(1, depth + 1):
        block = blocks[stop - 1]
        steps: list[tuple[int, int, float, float, Narrowing | Replacement | None]] = []
        if block is not None:
            steps.append((stop - 1, 0, *block))
        steps += [
            (s.entry.span.start, len(s.entry.span), s.effect, s.saved, s.entry)
            for s in ending.get(stop, [])
        ]
        for start, gone, effect, saved, cut in steps:
            for count, before in best[start].items():
                path, known = before.then(effect, saved, cut), best[stop].get(count + gone)
                if known is None or path.effect < known.effect:
                    best[stop][count + gone] = path
    return {count: path for count, path in best[depth].items() if count < depth}
