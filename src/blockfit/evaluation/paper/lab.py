"""What the experiments of ``blockfit reproduce`` share: model, images, moments and the judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.evaluation.paper.judge import Judge, Verdict
from blockfit.evaluation.paper.translators import STEPS, TOKENS
from blockfit.fit.closed_form import fit_map, identity_error
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Plan, Replacement, Span, spans_up_to
from blockfit.models.blocks import Blocks, call, record
from blockfit.models.forward import evaluating, first_images
from blockfit.progress import Progress, Say, silent
from blockfit.search.calibrate import calibrate
from blockfit.search.solve import Solution
from blockfit.search.states import TracedImages

Row = dict[str, Any]
"""One line of a table: column → text, number or nothing."""

Candidate = tuple[Row, Solution]
"""What is known of a solution, and the solution."""

MOST_BYTES = 2 << 30
"""Memory for hidden states at single boundaries; beyond it, the images are run again."""


@dataclass(frozen=True)
class Settings:
    """How much is measured; the defaults are those of the paper where it says.

    Args:
        calibration: images that maps are fitted on.
        starts: at most this many starts of each length, evenly spread; all where ``None``.
        compared: lengths of the spans on which maps are compared.
        sets: how many sets of separate spans are tried for every number of removed blocks.
        samples: numbers of calibration images that are compared.
        positions: the same for maps per token position.
        steps: of Adam, for trained translators.
        tokens: in each of these steps.
        seeds: how many draws of the calibration images are averaged over.
        seed: the first of them.
    """

    calibration: int = 500
    longest: int = 5
    starts: int | None = None
    compared: tuple[int, ...] = (1, 2, 3, 4, 5)
    sets: int = 3
    samples: tuple[int, ...] = (50, 100, 250, 500, 1000, 2500, 5000)
    positions: tuple[int, ...] = (500, 1000, 2500, 5000)
    steps: int = STEPS
    tokens: int = TOKENS
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration", "longest", "sets", "steps", "tokens", "seeds"):
            if getattr(self, name) < 1:
                raise BlockfitError(f"{name} must be 1 or more, got {getattr(self, name)}")

    def fitting(self, depth: int) -> Settings:
        """The same for a model of ``depth`` blocks: one block must be left.

        Raises:
            BlockfitError: where the model has one block only.
        """
        if depth < 2:
            raise BlockfitError("the model has one block only; there is nothing to replace")
        longest = min(self.longest, depth - 1)
        compared = tuple(length for length in self.compared if length <= longest)
        return replace(self, longest=longest, compared=compared or (longest,))


FULL = Settings()
QUICK = Settings(
    starts=3, compared=(2, 4), sets=1, samples=(50, 150, 500), positions=(250, 500), tokens=1024
)

Draw = Callable[[int, int], Images]
"""(number, seed) → that many calibration images, drawn over the whole set; fewer if there are."""


@dataclass
class Lab:
    """One model and its images.

    Args:
        model: the original; left as it was.
        transfers: other sources of calibration images, by name.
    """

    model: nn.Module
    blocks: Blocks
    settings: Settings
    draw: Draw
    judge: Judge
    transfers: Mapping[str, Draw] = field(default_factory=dict)
    say: Say = silent
    progress: Progress = silent

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def spans(self) -> list[Span]:
        """Every span that may be looked at."""
        return spans_up_to(self.blocks.depth, self.settings.longest)

    def calibration(self) -> Images:
        """The calibration images of the first seed."""
        return self.draw(self.settings.calibration, self.settings.seed)

    @cached_property
    def moments(self) -> Moments:
        """Moments of all spans on the calibration images, all tokens."""
        return self.calibrated(self.calibration(), self.spans)

    def calibrated(self, images: Images, spans: Sequence[Span]) -> Moments:
        """Moments of some spans on some images, from all tokens."""
        self.say(f"moments of {len(spans)} spans on {len(images)} images")
        return calibrate(self.model, self.blocks, images, spans, progress=self.progress)

    @cached_property
    def originals(self) -> TracedImages:
        """The original on the calibration images, for refits."""
        self.say("original model on the calibration images")
        return TracedImages.of(self.model, self.blocks, self.calibration(), progress=self.progress)

    def distance(self, span: Span) -> float:
        """The paper's similarity: mean squared difference between h[start] and h[stop]."""
        return identity_error(self.moments.regression(span)) / self.blocks.width

    def nearest(self, length: int) -> Span:
        """The span of this length that the paper's similarity chooses."""
        return min((s for s in self.spans if len(s) == length), key=self.distance)

    def compared(self) -> list[Span]:
        """The spans on which maps are compared: for each length the one with the smallest MSE."""
        return [self.nearest(length) for length in self.settings.compared]

    def solved(self, span: Span, kind: str, moments: Moments, ridge: float = 0.0) -> Solution:
        """One span with a map of a kind; the paper's by default: plain least squares."""
        entry = Replacement(span, kind)
        return Solution(Plan((entry,)), (fit_map(entry, moments, ridge),))

    def judged(self, candidates: Iterable[Candidate], seed: int | None = None) -> list[Row]:
        """Judge candidates, and put the verdicts after what is known of each; the original first.

        Only as many are held at a time as their maps have room for in ``MOST_BYTES``.

        Args:
            candidates: all rows with the same columns.
            seed: of probes; the first seed by default.
        """
        seed = self.settings.seed if seed is None else seed
        whole = self.judge.original(seed)
        rows: list[Row] = []
        for group in _within(candidates, MOST_BYTES):
            self.say(f"judging {len(group)} models on {self.judge.images} test images")
            solutions = {str(number): solution for number, (_, solution) in enumerate(group)}
            found = self.judge.verdicts(solutions, seed)
            rows += [
                {**known, **_columns(verdict, whole)}
                for (known, _), verdict in zip(group, found.values(), strict=True)
            ]
        told = {"removed": 0, "spans": "", "map": "original", **_columns(whole, whole)}
        return [{column: told.get(column) for column in rows[0]}, *rows]

    def states(
        self, images: Images, spans: Sequence[Span]
    ) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """Spans with h[start] and h[stop] of all images, shape (images, tokens, width).

        They lie on the CPU, and only as many boundaries at a time as ``MOST_BYTES`` has room for.
        """
        example = images.first("calibrate on")
        with self._recording() as recorded:
            call(self.model, first_images(example, 1))
            room = MOST_BYTES // max(1, recorded[0].nbytes * len(images))
        for group in _groups(spans, room):
            wanted = sorted({b for span in group for b in (span.start, span.stop)})
            parts: dict[int, list[Tensor]] = {b: [] for b in wanted}
            self.say(f"hidden states of {len(images)} images at {len(wanted)} boundaries")
            with self._recording() as recorded:
                for number, batch in enumerate(images.batches()):
                    call(self.model, batch.inputs)
                    for b in wanted:
                        parts[b].append(recorded[b].float().cpu())
                    done = min((number + 1) * images.batch_size, len(images))
                    self.progress(done, len(images))
            whole = {b: torch.cat(parts.pop(b)) for b in wanted}
            for span in group:
                yield span, whole[span.start], whole[span.stop]

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        with evaluating(self.model), torch.no_grad(), record(self.model, self.blocks) as states:
            yield states


def thinned(spans: Sequence[Span], starts: int | None) -> list[Span]:
    """At most ``starts`` spans of each length, evenly spread from the first to the last."""
    kept = []
    for length in sorted({len(span) for span in spans}):
        group = [span for span in spans if len(span) == length]
        count = len(group) if starts is None else min(starts, len(group))
        chosen = np.linspace(0, len(group) - 1, count).round().astype(int)
        kept += [group[i] for i in dict.fromkeys(chosen.tolist())]
    return kept


def _groups(spans: Sequence[Span], room: int) -> list[list[Span]]:
    """Spans in groups that touch at most ``room`` boundaries, or one span alone."""
    groups: list[list[Span]] = [[]]
    for span in spans:
        together = {b for s in (*groups[-1], span) for b in (s.start, s.stop)}
        if groups[-1] and len(together) > room:
            groups.append([])
        groups[-1].append(span)
    return [group for group in groups if group]


def _within(candidates: Iterable[Candidate], most_bytes: int) -> Iterator[list[Candidate]]:
    """Candidates in groups whose maps and weights have room in ``most_bytes``, or one alone."""
    group: list[Candidate] = []
    size = 0
    for candidate in candidates:
        maps, weights = candidate[1].maps, candidate[1].weights
        tensors = [t for module in maps for t in module.state_dict().values()]
        own = sum(tensor.nbytes for tensor in (*tensors, *weights.values()))
        if group and size + own > most_bytes:
            yield group
            group, size = [], 0
        group.append(candidate)
        size += own
    if group:
        yield group


def _columns(found: Verdict, original: Verdict) -> Row:
    change = 100 * (found.top1 - original.top1)
    return {"top1": found.top1, "change": change, **asdict(found)}


@contextmanager
def stopwatch(into: Row) -> Iterator[None]:
    """Write wall and CPU seconds of the ``with`` into a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        into["seconds"] = round(time.perf_counter() - wall, 2)
        into["cpu_seconds"] = round(time.process_time() - cpu, 2)
