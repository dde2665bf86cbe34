"""Held-out images: the judge of maps and plans, by their true effect on the model's output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from blockfit.blocks import Blocks, overridden
from blockfit.data import Images
from blockfit.errors import BlockfitError
from blockfit.fidelity import Fidelity, FidelityMeter
from blockfit.head import Observation, observe
from blockfit.numerics import exact
from blockfit.probe import evaluating
from blockfit.repair import Solution, swapped
from blockfit.spans import Plan, Replacement
from blockfit.trace import Trace, trace


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
    """Held-out images with their hidden states cached at every boundary.

    A candidate runs only the blocks behind its first span; everything before it is taken from
    the cache, and the model's own forward does the rest.

    Args:
        model: the original model.
        blocks: where its blocks are.
        images: images that no map is fitted on; their batch size is the unit of ``batches``.
        progress: called with images done and images in all.

    Raises:
        BlockfitError: no image, NaN or infinite hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        images: Images,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.traces: list[Trace] = []
        self.labels: list[Tensor | None] = []
        with evaluating(model):
            for batch in images.batches():
                keep = range(blocks.depth + 1)
                self.traces.append(trace(model, blocks, batch.inputs, keep, batch.names))
                self.labels.append(batch.labels)
                if progress is not None:
                    progress(len(self), len(images))
        if not self.traces:
            raise BlockfitError("there are no held-out images to judge by; give more images")
        self._begin(model, blocks)

    @classmethod
    def of_traces(cls, model: nn.Module, blocks: Blocks, traces: Sequence[Trace]) -> HeldOut:
        """The same on batches that were traced already, with all their hidden states."""
        made = cls.__new__(cls)
        made.traces, made.labels = list(traces), [None] * len(traces)
        made._begin(model, blocks)
        return made

    def _begin(self, model: nn.Module, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks
        whole = Solution(Plan(), ())
        self.original = [observe_solution(model, blocks, seen, whole) for seen in self.traces]
        self.passes = 0.0
        """Work done by ``score`` so far, in forward passes of one image through all blocks."""

    def __len__(self) -> int:
        return sum(len(seen.states[0]) for seen in self.traces)

    def score(self, solution: Solution, batches: Sequence[int] | None = None) -> Fidelity:
        """Fidelity of a solved plan, on all held-out images or on some batches of them."""
        meter = FidelityMeter()
        for number in range(len(self.traces)) if batches is None else batches:
            meter.add(self.original[number], self._observe(number, solution))
        self.passes += meter.images * self.cost(solution)
        return meter.result()

    def cost(self, solution: Solution) -> float:
        """The part of a plain forward pass that one image costs: the blocks that are run."""
        depth = self.blocks.depth
        run = depth - first_touched(solution, depth) - len(solution.plan.removed_blocks)
        return run / depth

    def accuracy(self, solution: Solution) -> float | None:
        """Top-1 of the model's own head; ``None`` without labels or without a head."""
        right = total = 0
        for number, labels in enumerate(self.labels):
            logits = self._observe(number, solution).logits
            if labels is None or logits is None:
                return None
            right += int((logits.argmax(1).cpu() == labels.cpu()).sum())
            total += len(labels)
        return right / total

    def map_errors(self, solution: Solution) -> list[MapError]:
        """The local held-out error of every map of ``solution``, beside identity's."""
        return self.judge(solution)[1]

    def judge(self, solution: Solution) -> tuple[Fidelity, list[MapError]]:
        """``score``, and the local error of every map beside identity's, in one go.

        A folded map lies in the block before its span, so that identity's error is that of the
        original's state before the span.
        """
        k = self.blocks.prefix_tokens
        sums = {entry: torch.zeros(3, 2, dtype=torch.float64) for entry in solution.plan}

        def note(entry: Replacement, seen: Trace, before: Tensor, after: Tensor) -> None:
            target = exact(seen.states[entry.span.stop])
            if entry.map == "folded":
                before = exact(seen.states[entry.span.start])
            spread = target - target.mean(dim=(0, 1))
            for column, tokens in enumerate((slice(0, k), slice(k, None))):
                for row, gap in enumerate((after - target, before - target, spread)):
                    sums[entry][row, column] += gap[:, tokens].square().sum().cpu()

        meter = FidelityMeter()
        for seen, original in zip(self.traces, self.original, strict=True):
            found = observe_solution(
                self.model,
                self.blocks,
                seen,
                solution,
                lambda entry, x, y, seen=seen: note(entry, seen, x, y),  # type: ignore[misc]
            )
            meter.add(original, found)
        self.passes += meter.images * self.cost(solution)
        return meter.result(), [
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
            for entry, total in sums.items()
        ]

    def _observe(self, number: int, solution: Solution) -> Observation:
        return observe_solution(self.model, self.blocks, self.traces[number], solution)


def observe_solution(
    model: nn.Module,
    blocks: Blocks,
    seen: Trace,
    solution: Solution,
    listen: Callable[[Replacement, Tensor, Tensor], None] | None = None,
) -> Observation:
    """What ``model`` says of a traced batch with ``solution`` in it, without changing the model.

    Only the blocks behind the first one that the solution touches are run; ``seen`` must hold
    the state at ``first_touched``, and those before it where a head reads intermediate layers.
    ``listen`` gets every replacement with its map's input and output in float64.
    """
    first = first_touched(solution, blocks.depth)
    functions: dict[int, Callable[[Tensor], Tensor]] = {}
    start = seen.states[first]
    for index in range(first - 1):
        functions[index] = partial(_known, seen.states.get(index + 1))
    if first > 0:
        # A copy: the block that reads it may write into its input.
        functions[first - 1] = lambda hidden: start.clone()
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
    with swapped(model, solution.weights), overridden(model, blocks, functions):
        return observe(model, blocks, seen.inputs)


def first_touched(solution: Solution, depth: int) -> int:
    """The first block that is not the original's; the depth where nothing was changed."""
    starts = [e.span.start - (e.map == "folded") for e in solution.plan]
    return min(starts, default=depth)


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _known(state: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden if state is None else state


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else float(part)
