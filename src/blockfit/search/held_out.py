"""Held-out images: the judge of maps and plans, by their true effect on the model's output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.errors import BlockfitError, first_line
from blockfit.fit.numerics import exact
from blockfit.fit.plan import Plan, Replacement
from blockfit.models.blocks import Blocks, overridden
from blockfit.models.forward import FORWARD_ERRORS
from blockfit.models.head import Observation, observe, right_answers
from blockfit.models.narrowed import narrowed
from blockfit.models.padding import real_rows, without_padding
from blockfit.models.surgery import swapped
from blockfit.models.trace import Trace
from blockfit.search.fidelity import (
    Fidelity,
    FidelityMeter,
    Sums,
    compared,
    effect_of,
    effects,
)
from blockfit.search.solve import Solution
from blockfit.search.states import TracedImages

Compare = Callable[[Observation, Observation], Sums]
"""The sums of one batch, of the original's outputs and a candidate's."""

NAMED = 3
"""Candidates that a warning names."""


def left_out(failed: Mapping[Plan, str]) -> list[str]:
    """A line that names the candidates that the model cannot be run with; none without any."""
    if not failed:
        return []
    told = [f"{plan} ({reason})" for plan, reason in [*failed.items()][:NAMED]]
    more = len(failed) - len(told)
    rest = f"; and {more} more" if more else ""
    return [f"left out, because the model cannot be run with them: {'; '.join(told)}{rest}"]


@dataclass(frozen=True)
class MapError:
    """The local error of one map on held-out images, beside identity's and per token type.

    Each is Σ‖T(x) − h[stop]‖² / Σ‖h[stop] − mean‖², with x what the compressed prefix feeds it;
    ``None`` where there are no tokens of the type.
    """

    span: str
    map: str
    error: float
    identity_error: float
    prefix: float | None
    patch: float | None
    identity_prefix: float | None
    identity_patch: float | None


class HeldOut:
    """Judges solved plans by what they do to the model's output on images that they are not fitted
    on.

    A candidate runs only the blocks after its first cut; everything before it is taken from the
    kept states, and the model's own forward does the rest. In a run on several processes each does
    a part of the work; all get the same figures.

    Args:
        images: with all their hidden states; a batch is the unit of ``batches``. Of several views,
            the first, as they are, judge.
        views: of each, for solutions on all images.
        wider: of each, for the effects of single cuts (``wider``).
    """

    def __init__(self, images: TracedImages, views: int = 1, wider: int = 1) -> None:
        self.model, self.blocks = images.model, images.blocks
        self._traced = images
        self.views = images.shown(views)
        self._look_at(images.shown(1))
        self.wider = self
        """The same with so many views of every image: what a cut does to them tells it from others
        better than to few images, and no plan is judged by them."""
        if wider > 1:
            self.wider = copy.copy(self)
            self.wider._look_at(images.shown(wider))

    def seen(self, views: int, wider: int) -> HeldOut:
        """The same images with other numbers of views."""
        return HeldOut(self._traced, views, wider)

    def _look_at(self, images: TracedImages) -> None:
        self.images = images
        self._at = {number: place for place, number in enumerate(images.numbers)}
        self.original: list[Observation] = [
            observe_solution(self.model, self.blocks, seen, Solution(Plan(), ()))
            for seen in images.traces
        ]
        self.passes = 0.0
        """Work done by ``trials`` and ``judge`` so far, in forward passes of one image through all
        blocks."""

    @property
    def sizes(self) -> list[int]:
        """Images of every batch, of all processes."""
        return list(self.images.sizes.values())

    @cached_property
    def top1(self) -> float | None:
        """The original's, by its own head; ``None`` without labels of the head's classes."""
        counts = [self._right(place, seen) for place, seen in enumerate(self.original)]
        return _share(counts)

    @cached_property
    def _fits(self) -> bool:
        """Whether the images' labels are classes of the model's own head."""
        logits = self.original[0].logits
        if logits is None or not self.images.matching.fits(logits.shape[1]):
            return False
        pairs = zip(self.original, self.images.labels, strict=True)
        counts = [right_answers(seen, labels) for seen, labels in pairs]
        _, inside, outside = (sum(column) for column in zip(*counts, strict=True))
        return inside > outside

    def __len__(self) -> int:
        return len(self.images)

    def score(self, solution: Solution, batches: Sequence[int] | None = None) -> Fidelity:
        """Fidelity of a solved plan, on all held-out images or on some batches of them."""
        return self.scores([solution], batches)[0]

    def scores(
        self, solutions: Sequence[Solution], batches: Sequence[int] | None = None
    ) -> list[Fidelity]:
        """``score`` of several solutions; the processes of a run share the work.

        Raises:
            BlockfitError: where one of them cannot be run.
        """
        failed: dict[Plan, str] = {}
        found = self.trials(solutions, failed, batches)
        for plan, reason in failed.items():
            raise BlockfitError(f"the model cannot be run with {plan}: {reason}")
        return [fidelity for fidelity in found if fidelity is not None]

    def trials(
        self,
        solutions: Sequence[Solution],
        failed: dict[Plan, str],
        batches: Sequence[int] | None = None,
    ) -> list[Fidelity | None]:
        """``scores``, with ``None`` for one that cannot be run; why is written into ``failed``."""
        out: list[Fidelity | None] = []
        for sums in self._tried_all(solutions, failed, batches, compared):
            meter = FidelityMeter()
            for values in sums or ():
                meter.add_sums(values)
            out.append(None if sums is None else meter.result())
        return out

    def effects(
        self,
        solutions: Sequence[Solution],
        failed: dict[Plan, str],
        batches: Sequence[int] | None = None,
    ) -> list[float | None]:
        """What single cuts are compared by (``fidelity.effect_of``), as ``trials``."""
        found = self._tried_all(solutions, failed, batches, effects)
        return [None if sums is None else effect_of(sums) for sums in found]

    def _tried_all(
        self,
        solutions: Sequence[Solution],
        failed: dict[Plan, str],
        batches: Sequence[int] | None,
        compare: Compare,
    ) -> list[list[Sums] | None]:
        """The sums of every batch for each solution; ``None`` for one that cannot be run."""
        numbers = list(range(len(self.sizes))) if batches is None else list(batches)
        tasks = [(number, i) for i in range(len(solutions)) for number in numbers]
        found = self._spread(tasks, lambda number, i: self._tried(number, solutions[i], compare))
        out: list[list[Sums] | None] = []
        for i, solution in enumerate(solutions):
            sums = found[i * len(numbers) : (i + 1) * len(numbers)]
            if reasons := [reason for reason in sums if isinstance(reason, str)]:
                failed[solution.plan] = reasons[0]
                out.append(None)
                continue
            self.passes += sum(int(values[0]) for values in sums) * self.cost(solution)
            out.append(sums)
        return out

    def _tried(self, number: int, solution: Solution, compare: Compare) -> Sums | str:
        """What was compared; or in one line why it could not be, for all processes to know."""
        try:
            seen = self.images.traces[self._at[number]]
            found = observe_solution(self.model, self.blocks, seen, solution)
            return compare(self.original[self._at[number]], found)
        except FORWARD_ERRORS as error:
            return first_line(error)

    def _spread(
        self, tasks: Sequence[tuple[int, int]], work: Callable[[int, int], Any]
    ) -> list[Any]:
        """Do tasks (batch, anything) where their batches are, or in turn; JSON results of all."""
        owners = self.images.owners
        owner = None if owners is None else lambda task: owners[task[0]]
        return ranks.spread(tasks, lambda task: work(*task), owner)

    def cost(self, solution: Solution) -> float:
        """The part of a plain forward pass that one image costs: the blocks that are run."""
        depth = self.blocks.depth
        run = depth - first_touched(solution, depth) - len(solution.plan.removed_blocks)
        return run / depth

    def _right(self, place: int, seen: Observation) -> list[int]:
        """Right answers, labelled images and labels outside the head's classes, of a batch."""
        return list(right_answers(seen, self.images.labels[place])) if self._fits else [0, 0, 0]

    def judge(self, solution: Solution) -> tuple[Fidelity, list[MapError], float | None]:
        """``score``, the local error of every map beside identity's, and top-1, in one go.

        Top-1 is that of the model's own head, ``None`` where ``self.top1`` is. A folded map lies
        in the block before its span, so that identity's error is that of the original's state
        before the span.
        """
        k, entries = self.blocks.prefix_tokens, list(solution.plan)

        def work(number: int, _: int) -> tuple[Sums, list[list[list[float]]], list[int]]:
            seen = self.images.traces[self._at[number]]
            gaps = {entry: torch.zeros(3, 2, dtype=torch.float64) for entry in entries}

            def note(entry: Replacement, before: Tensor, after: Tensor) -> None:
                target = exact(seen.states[entry.span.stop])
                if entry.map == "folded":
                    before = exact(seen.states[entry.span.start])
                spread = target - real_rows(target, seen.real).reshape(-1, target.shape[-1]).mean(0)
                for column, tokens in enumerate((slice(0, k), slice(k, None))):
                    for row, gap in enumerate((after - target, before - target, spread)):
                        own = without_padding(gap, seen.real)[:, tokens]
                        gaps[entry][row, column] += own.square().sum().cpu()

            found = observe_solution(self.model, self.blocks, seen, solution, note)
            same = compared(self.original[self._at[number]], found)
            right = self._right(self._at[number], found)
            return same, [gaps[entry].tolist() for entry in entries], right

        meter = FidelityMeter()
        sums = [torch.zeros(3, 2, dtype=torch.float64) for _ in entries]
        found = self._spread([(number, 0) for number in range(len(self.sizes))], work)
        for same, gaps, _ in found:
            meter.add_sums(same)
            for total, gap in zip(sums, gaps, strict=True):
                total += torch.tensor(gap, dtype=torch.float64)
        self.passes += meter.images * self.cost(solution)
        map_errors = [
            MapError(
                span=str(entry.span),
                map=entry.map,
                error=_ratio(total[0].sum(), total[2].sum()),
                identity_error=_ratio(total[1].sum(), total[2].sum()),
                prefix=_ratio(total[0, 0], total[2, 0]) if k else None,
                patch=_ratio(total[0, 1], total[2, 1]),
                identity_prefix=_ratio(total[1, 0], total[2, 0]) if k else None,
                identity_patch=_ratio(total[1, 1], total[2, 1]),
            )
            for entry, total in zip(entries, sums, strict=True)
        ]
        return meter.result(), map_errors, _share([right for _, _, right in found])


def observe_solution(
    model: nn.Module,
    blocks: Blocks,
    seen: Trace,
    solution: Solution,
    listen: Callable[[Replacement, Tensor, Tensor], None] | None = None,
) -> Observation:
    """What ``model`` says of a traced batch with ``solution`` in it, without changing the model.

    Only the blocks after the first one that the solution touches are run; ``seen`` must hold
    the state at ``first_touched``, and those before it where a head reads intermediate layers.
    ``listen`` gets every replacement with its map's input and output in float64.
    """
    first = first_touched(solution, blocks.depth)
    functions: dict[int, Callable[[Tensor], Tensor]] = {}
    start = seen.states[first]
    for index in range(first - 1):
        functions[index] = partial(_known, seen.after(index))
    if first > 0:
        before = seen.after(first - 1)
        assert before is not None, "the state before the first block that is touched was kept"
        # A copy: the block that reads it may write into its input.
        functions[first - 1] = lambda hidden: before.clone()
    for entry, module in zip(solution.plan, solution.maps, strict=True):
        for index in range(entry.span.start, entry.span.stop - 1):
            functions[index] = _same
        own = copy.deepcopy(module).to(start)  # the solution keeps its float32

        def apply(hidden: Tensor, own: nn.Module = own, entry: Replacement = entry) -> Tensor:
            # With no block before it, the model itself hands over h[0].
            out: Tensor = own(hidden)
            if listen is not None:
                listen(entry, exact(hidden), exact(out))
            return out

        functions[entry.span.stop - 1] = apply
    with (
        narrowed(model, blocks, solution.plan.narrowings, solution.weights),
        swapped(model, solution.weights),
        overridden(model, blocks, functions, seen.rests),
    ):
        return observe(model, blocks, seen.inputs)


def first_touched(solution: Solution, depth: int) -> int:
    """The first block that is not the original's; the depth where nothing was changed."""
    starts = [e.span.start - (e.map == "folded") for e in solution.plan]
    return min([*starts, *(cut.block for cut in solution.plan.narrowings)], default=depth)


def _share(counts: Sequence[Sequence[int]]) -> float | None:
    """The right ones among the labelled ones; ``None`` where nothing is labelled."""
    labelled = sum(known for _, known, _ in counts)
    return sum(right for right, _, _ in counts) / labelled if labelled else None


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _known(state: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden if state is None else state


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else float(part)
