"""Plans of several kinds of cuts for any budget, from one calibration.

The method in order: curves → choose → solve → judge. Blocks are replaced by maps, and parts of
blocks keep fewer dimensions, under one budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from blockfit.errors import BlockfitError, first_line
from blockfit.fields import read, written
from blockfit.fit.closed_form import RIDGE, fit_map
from blockfit.fit.maps import empty_map
from blockfit.fit.moments import Moments
from blockfit.fit.plan import PARTS, Narrowing, Plan, Replacement, Span, runs_of, spans_up_to
from blockfit.progress import Progress, Say, silent
from blockfit.search.budget import Sizes
from blockfit.search.choose import Choice, Priced, choose, choose_uniform
from blockfit.search.curves import Curve, curves, key_of, widths_of
from blockfit.search.held_out import HeldOut, left_out
from blockfit.search.plan_judge import PlanJudge, Point
from blockfit.search.recipes import Recipe
from blockfit.search.solve import Choices, Solution
from blockfit.search.spill import GroupedMoments
from blockfit.search.states import TracedImages

LONGEST_SPAN = 2
"""Blocks of the longest span that is weighed against narrowing; longer ones cost far more."""

FINALISTS = 3
"""Plans that are solved and judged where few are possible and whole blocks go in some."""

SETTLED = 8
"""Tokens per neuron from which on a choice of neurons is taken over into the solution that judges
it: what it knows of the held-out images makes their error a few percent low there, more before."""

CLOSE = 0.015
"""How far below a budget of latency a plan may stay: timing is no better."""

ROUNDS = 8
"""Times that a plan is chosen again because its cost was not what its parts' costs add up to."""


@dataclass(frozen=True)
class Prices:
    """What latency is saved by, as parts of the original's.

    Args:
        units: (block, part) → one dimension less.
        spans: blocks of a span → the span with its map in its place.
    """

    units: Mapping[tuple[int, str], float]
    spans: Mapping[int, float]


@dataclass(frozen=True)
class _Timed:
    """A plan that was timed, and the part of the time that it was chosen to leave."""

    target: float
    measured: float
    plan: Plan

    def towards(self, slow: _Timed | None, wanted: float) -> float:
        """What to choose the next plan for: between this one and one that is too slow."""
        target, measured = (1.0, 1.0) if slow is None else (slow.target, slow.measured)
        part = (wanted - self.measured) / (measured - self.measured)
        return self.target + min(max(part, 0.1), 0.9) * (target - self.target)


@dataclass(frozen=True)
class Share:
    """What a plan has to reach.

    Args:
        kind: ``params``, ``flops`` or ``latency``.
        value: the part of the original that may remain.
    """

    kind: str
    value: float


class CutSearch:
    """Finds plans of cuts for budgets of parameters, FLOPs or latency.

    Args:
        moments: of spans up to ``LONGEST_SPAN``; called where spans are weighed.
        multiple: widths of MLPs are multiples of it.
        precision: solved values are rounded to what this dtype can hold; ``None`` keeps them.
        says: whether a stock config can say a plan; asked where the recipe is uniform.
    """

    def __init__(
        self,
        originals: TracedImages,
        held_out: HeldOut,
        sizes: Sizes,
        recipe: Recipe,
        protected: Sequence[int],
        whole: Sequence[int],
        moments: Callable[[list[Span]], Moments | GroupedMoments],
        multiple: int | None = None,
        precision: torch.dtype | None = None,
        say: Say = silent,
        progress: Progress = silent,
        says: Callable[[Plan], bool] | None = None,
    ) -> None:
        self.originals, self.held_out, self.sizes, self.recipe = originals, held_out, sizes, recipe
        self._says = says or (lambda plan: True)
        self.protected, self.whole = frozenset(protected) | set(whole), tuple(whole)
        self.depth = originals.blocks.depth
        self._moments, self._multiple = moments, multiple
        self._say, self._progress = say, progress
        self._judge = PlanJudge(originals, held_out, recipe.options, progress, precision)
        self._curves: list[Curve] | None = None
        self._failed: dict[Plan, str] = {}
        self._spans: list[tuple[Plan, float]] | None = None

    def measure(self) -> None:
        """Measure curves and effects now, not when the first plan asks for them."""
        _ = self.curves, self.spans

    def state(self) -> dict[str, Any]:
        """What was measured so far, as JSON values, to go on from after a stop."""
        parts = written(self.curves)
        spans = [[plan.to_json(), effect] for plan, effect in self.spans]
        failed = [[plan.to_json(), reason] for plan, reason in self._failed.items()]
        return {"curves": parts, "spans": spans, "failed": failed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned.

        Raises:
            BlockfitError: where it is damaged, or of another model.
        """
        if "curves" not in state:
            return
        try:
            curves = [read(Curve, value, "curve") for value in state["curves"]]
            spans = [(Plan.from_json(plan), float(e)) for plan, e in state["spans"]]
            failed = {Plan.from_json(plan): why for plan, why in state.get("failed", ())}
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise BlockfitError(
                f"the curves that were measured before are damaged ({first_line(error)}); measure "
                "them again, into a new folder"
            ) from error
        for curve in curves:
            part = curve.whole
            if part.block >= self.depth or part != self._part(part.block, part.part):
                raise BlockfitError(
                    f"the curves that were measured before are of another model: {part.part} of "
                    f"block {part.block} are otherwise"
                )
        for plan, _ in spans:
            plan.check(self.depth, self.protected)
        self._curves, self._spans, self._failed = curves, spans, failed

    @property
    def _removes(self) -> bool:
        """Whether whole blocks may go."""
        return "blocks" in self.recipe.cuts and not self.originals.blocks.stages

    def _part(self, block: int, name: str) -> Narrowing | None:
        return self.originals.probe.parts(block).whole.get(name)

    @property
    def curves(self) -> list[Curve]:
        """Of all parts that may be narrowed; measured at the first call."""
        if self._curves is None:
            self._say("narrowing: errors and effects of all parts")
            self._curves = curves(
                self.originals,
                self.held_out.wider,
                [part for part in PARTS if part in self.recipe.cuts],
                self.whole,
                multiple=self._multiple,
                progress=self._progress,
                failed=self._failed,
            )
        return self._curves

    @property
    def spans(self) -> list[tuple[Plan, float]]:
        """Plans of one short span each, with their effects; measured at the first call."""
        if self._spans is None:
            self._spans = []
            if self._removes:
                some = spans_up_to(self.depth, min(LONGEST_SPAN, self.depth - 2), self.protected)
                self._spans = self._scored(some)
        return self._spans

    def _scored(self, spans: list[Span]) -> list[tuple[Plan, float]]:
        if not spans:
            return []
        self._say(f"effects of {len(spans)} spans")
        moments, options = self._moments(spans), self.recipe.options
        ridge = RIDGE if options.ridge is None else options.ridge
        solutions = []
        for span in spans:
            entries = [Replacement(span, "identity")] if self.recipe.uniform else []
            entries += [
                entry
                for entry in self.recipe.replacements(span, self.originals.blocks.width)
                if entry.map != "folded"
            ]
            for entry in entries[-1:]:
                fitted = fit_map(entry, moments.of(span), ridge, options.prefix_weight)
                solutions.append(Solution(Plan((entry,)), (fitted,)))
        judges = self.held_out.wider
        batches = range((len(judges.sizes) + 1) // 2)  # spans cost more; half will do
        scores = judges.effects(solutions, self._failed, batches)
        pairs = zip(solutions, scores, strict=True)
        return [(solution.plan, score) for solution, score in pairs if score is not None]

    def warnings(self) -> list[str]:
        """Which cuts were left out because the model cannot be run with them, and why."""
        return left_out(self._failed)

    def refused(self) -> dict[str, str]:
        """Why parts cannot be narrowed, in words that several blocks share."""
        out: dict[str, str] = {}
        for index in range(self.depth):
            for part, why in self.originals.probe.parts(index).refused.items():
                if part in self.recipe.cuts:
                    out.setdefault(part, why)
        return out

    def smallest(self, share: Share, prices: Prices | None = None) -> float:
        """The part of the original that remains where all goes that may."""
        cuts = tuple(replace(curve.whole, kept=curve.widths[-1]) for curve in self.curves)
        if share.kind == "latency":
            assert prices is not None
            saved = sum((c.size - c.kept) * prices.units[c.block, c.part] for c in cuts)
            return 1 - saved
        return self.sizes.known_fraction(Plan((), cuts), share.kind)

    def check_reach(self, share: Share) -> None:
        """Refuse a size that no plan can have, before effects are measured."""
        if share.kind == "latency" or share.value >= 1:
            return
        least = 1.0
        for index in range(self.depth):
            left = self.sizes.fraction(self._most_of(index), share.kind)
            if left is None:
                return  # FLOPs without a block that the model needs cannot be counted
            least -= 1 - left
        if least > share.value:
            raise BlockfitError(
                f"{share.kind} {share.value:.1%} cannot be reached: with all gone that may go, "
                f"more than {least:.1%} remains; {self._advice}"
            )

    @property
    def _advice(self) -> str:
        """What to change where a size cannot be reached."""
        widths = f", or give less than multiple_of={self._multiple}" if self._multiple else ""
        return f"ask for more, or allow more kinds of cuts{widths}"

    def _most_of(self, index: int) -> Plan:
        """All of one block that may go."""
        if self._removes and index not in self.protected:
            return Plan.of([f"{index}:{index + 1}"], "identity")
        if index in self.whole:
            return Plan()
        parts = {
            name: part
            for name, part in self.originals.probe.parts(index).whole.items()
            if name in self.recipe.cuts
        }
        multiples = {"mlp": self._multiple}
        widths = {name: widths_of(part, multiples.get(name)) for name, part in parts.items()}
        return Plan((), tuple(replace(parts[n], kept=widths[n][-1]) for n in parts))

    def plan(self, share: Share, prices: Prices | None = None) -> Plan:
        """The plan of least added effect that meets a budget of size.

        Args:
            share: ``params`` or ``flops`` and the part that may remain; for ``latency`` what
                ``prices`` say.
            prices: latency of one dimension of every part, as a part of the original's.

        Raises:
            BlockfitError: where not even everything that may go is enough.
        """
        if not self.curves and not self.spans:
            why = "; ".join(f"{part}: {reason}" for part, reason in self.refused().items())
            raise BlockfitError(f"nothing in this model can be cut ({why or 'no kind of cut'})")
        return self.plans(share, prices)[0]

    def plans(self, share: Share, prices: Prices | None = None) -> list[Plan]:
        """The same, and where the recipe is uniform the best plans of other numbers of blocks.

        In the order of their added effects, which say little of plans without whole blocks.
        """
        to_save = 1 - share.value
        for _ in range(ROUNDS):
            choices = self._choices(share, to_save, prices)
            if not choices:
                break
            plans = [plan for choice in choices for plan in self._forms(choice.plan)]
            if share.kind == "latency":
                return plans
            left = [self.sizes.known_fraction(plan, share.kind) for plan in plans]
            if left[0] <= share.value + 1e-9:
                pairs = zip(plans, left, strict=True)
                return [plan for plan, part in pairs if part <= share.value + 1e-9]
            to_save += (left[0] - share.value) * 1.02 + 1e-6
        raise BlockfitError(
            f"{share.kind} {share.value:.1%} cannot be reached: with all gone that may go, "
            f"{self.smallest(share, prices):.1%} remains; {self._advice}"
        )

    def _choices(self, share: Share, to_save: float, prices: Prices | None) -> list[Choice]:
        """The knapsack's choice; several where the recipe is uniform. Costs are parts of the
        original's."""
        if share.kind == "latency":
            assert prices is not None
            units = dict(prices.units)
        elif share.kind == "flops":
            assert self.sizes.flops is not None
            units = {key_of(c): c.unit_flops / self.sizes.flops for c in self.curves}
        else:
            units = {key_of(c): c.unit / self.sizes.parameters for c in self.curves}
        spans = self._priced(share, prices)
        if self.recipe.uniform:
            how: dict[str, Any] = {"more_widths": self._ratios(), "says": self._says}
            found = choose_uniform(self.curves, spans, self.depth, to_save, units, **how)
            return found[:FINALISTS]
        one = choose(self.curves, spans, self.depth, to_save, units)
        return [] if one is None else [one]

    def _forms(self, plan: Plan) -> list[Plan]:
        """A plan with the maps that it may have: in a uniform one nothing or folded ones."""
        if not self.recipe.uniform or not plan.replacements:
            return [plan]
        joined = runs_of(plan.removed_blocks)
        forms = []
        if "folded" in self.recipe.maps and joined[-1].start > 0:
            kinds = ["folded" if span.start > 0 else "identity" for span in joined]
            entries = tuple(map(Replacement, joined, kinds))
            forms.append(Plan(entries, plan.narrowings))
        return [*forms, plan] if "identity" in self.recipe.maps or not forms else forms

    def _ratios(self) -> range:
        """Whole multiples of the model's width, which some configs are limited to."""
        size = max((curve.whole.size for curve in self.curves), default=0)
        width = self.originals.blocks.width
        return range(width, size, width)

    def says_uniform(self) -> bool:
        """Whether a stock config can say that all MLPs are narrower."""
        parts = [self.originals.probe.parts(i).whole.get("mlp") for i in range(self.depth)]
        mlps = [part for part in parts if part is not None]
        if len(mlps) < self.depth or self.whole or len({part.size for part in mlps}) > 1:
            return False
        tried = widths_of(mlps[0], self._multiple)
        width = self.originals.blocks.width
        few = [*range(width, mlps[0].size, width)[-2:], *tried[1:2]]
        return any(self._says(Plan((), tuple(replace(p, kept=k) for p in mlps))) for k in few)

    def _priced(self, share: Share, prices: Prices | None) -> list[Priced]:
        def saved(plan: Plan) -> float:
            if prices is not None:
                return prices.spans.get(len(plan.removed_blocks), 0.0)
            return 1 - self.sizes.known_fraction(plan, share.kind)

        return [Priced(plan.replacements[0], effect, saved(plan)) for plan, effect in self.spans]

    def solve(self, plan: Plan) -> Solution:
        """Solve a plan on all calibration images, those that chose it too."""
        return self._judge.solve_on_all(plan)

    def point(self, plan: Plan, solution: Solution | None = None) -> Point:
        """A plan solved on all images, with the figures that it has when solved on the fit images.

        Where there are enough images, the latter takes over which neurons stay, and the low ranks:
        a second choice would cost as much as the first.

        Args:
            plan: the cuts; a map that is worse than identity is replaced by it.
            solution: of the plan on all images, where it is known.
        """
        choices = Choices()
        if solution is None:
            self._say("solving the plan on all images")
            solution = self._judge.solve_on_all(plan, choices)
        self._say("solving the plan on the fit images, judging it on the held-out ones")
        judged = self._judge.point(plan, choices if self._settled(plan) else None)
        if judged.solution.plan != plan:
            self._say("solving the plan on all images")
            solution = self.solve(judged.solution.plan)
        return replace(judged, solution=solution)

    def _settled(self, plan: Plan) -> bool:
        """Whether a choice of neurons would hardly be another one without the held-out images."""
        widest = max((cut.size for cut in plan.narrowings if cut.part == "mlp"), default=0)
        return self.originals.shown(1).tokens >= SETTLED * widest

    def best_point(self, share: Share) -> Point:
        """The plan of least held-out loss among the few of least added effect."""
        plans = self.plans(share)
        if len(plans) == 1:
            return self.point(plans[0])
        points = []
        for number, plan in enumerate(plans, 1):
            self._say(f"judging plan {number} of {len(plans)}: {plan}")
            points.append(self._judge.point(plan))
        best = min(points, key=lambda point: point.fidelity.loss)
        self._say("solving the best plan on all images")
        return replace(best, solution=self.solve(best.solution.plan))

    def latency_prices(self, ratio: Callable[[Solution], float]) -> Prices:
        """What narrowing and spans save in latency, measured.

        Every kind of part is halved in all blocks and timed: dimensions of one kind cost alike.
        Of spans one of every length is timed.

        Args:
            ratio: the latency of a model with a solution in it over that of the original.
        """
        units: dict[tuple[int, str], float] = {}
        for part in PARTS:
            some = [curve for curve in self.curves if curve.whole.part == part]
            cuts = [replace(c.whole, kept=c.widths[len(c.widths) // 2]) for c in some]
            gone = sum(cut.size - cut.kept for cut in cuts)
            if not gone:
                continue
            self._say(f"latency with narrower {part}")
            saved = max(0.0, 1 - ratio(Solution(Plan((), tuple(cuts)), ())))
            units |= {key_of(curve): saved / gone for curve in some}
        spans: dict[int, float] = {}
        for plan, _ in self.spans:
            length = len(plan.removed_blocks)
            if length not in spans:
                self._say(f"latency without {length} of the blocks")
                spans[length] = max(0.0, 1 - ratio(self._unsolved(plan)))
        return Prices(units, spans)

    def _unsolved(self, plan: Plan) -> Solution:
        """A plan as it runs, whatever its weights will be."""
        width, prefix = self.originals.blocks.width, self.originals.blocks.prefix_tokens
        return Solution(plan, tuple(empty_map(entry, width, prefix) for entry in plan))

    def plan_for_latency(self, value: float, ratio: Callable[[Solution], float]) -> Plan:
        """The plan of least added effect whose measured latency is at most ``value``.

        What the parts' prices add up to is corrected by what the plan takes, in both directions:
        a plan that is faster than it need be has lost more than it need have.

        Raises:
            BlockfitError: where none is fast enough.
        """
        prices, target = self.latency_prices(ratio), value
        slow: _Timed | None = None
        fast: _Timed | None = None
        least = float("inf")
        for _ in range(ROUNDS):
            try:
                plan = self.plan(Share("latency", target), prices)
            except BlockfitError:
                if slow is None:
                    raise
                target = (target + slow.target) / 2  # a single slow time had asked for too much
                continue
            found = _Timed(target, ratio(self._unsolved(plan)), plan)
            least = min(least, found.measured)
            self._say(f"latency {found.measured:.1%} of the original's")
            if found.measured > value:
                slow = found
                target -= max(found.measured - value, 0.005)
            elif fast is None or target > fast.target:
                fast = found
            if fast is not None:
                if fast.measured >= value - CLOSE:
                    break
                target = fast.towards(slow, value - CLOSE / 2)
        if fast is not None:
            return fast.plan
        raise BlockfitError(
            f"latency {value:.1%} cannot be reached on this machine: the fastest plan that was "
            f"timed takes {least:.1%} of the original's time; ask for more"
        )
