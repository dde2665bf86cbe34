"""What a compressed model is worth: its accuracy, its fidelity to the original, and its cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockfit import drawing
from blockfit import processes as ranks
from blockfit.arguments import checked
from blockfit.checkpoint import Checkpoint
from blockfit.data.images import Images, LabelledBatch
from blockfit.errors import BlockfitError
from blockfit.evaluation import summaries
from blockfit.evaluation.answers import Answer, Answers, answers_of, answers_of_batch
from blockfit.fields import fields_written
from blockfit.files import FileForm, new_file, write_text
from blockfit.fit.intervals import CONFIDENCE, Interval, wilson
from blockfit.models.blocks import Batch, Blocks, block_modules
from blockfit.models.cost import (
    Timing,
    alternate,
    flops,
    parameters,
    peak_memory,
    runs_on,
    size_bytes,
    speedup,
)
from blockfit.models.forward import first_images, place, placed
from blockfit.models.head import Observation, observe, right_answers
from blockfit.models.load import label_names
from blockfit.models.stages import find_blocks
from blockfit.progress import Progress, silent
from blockfit.provenance import made
from blockfit.search.fidelity import Fidelity, FidelityMeter, Sums, compared
from blockfit.search.final import Final, Outcomes, final_of, finite, rows_of
from blockfit.summary import Summary, frame
from blockfit.units import amount, percent, share

FORM = FileForm(".json", '"peak_memory_bytes":')
"""Of the file of an evaluation."""


@dataclass(frozen=True)
class Figures:
    """One model's accuracy and cost.

    Args:
        top1: fraction of images that the model's own head classes as labelled; ``None`` without
            labels or without a head.
        labelled: how many images it was counted on.
        flops: of one image (``cost.flops``); ``None`` where they cannot be counted.
        size_bytes: of the weights file that the model is saved as.
        latency: of one image; ``None`` where it was not measured.
        throughput: of a batch; likewise.
        peak_memory_bytes: of tensors during the forward of a batch; ``None`` where it cannot be
            had or was not measured.
        no_head: why no head was recognised, so that there is no accuracy; empty where one was.
    """

    top1: float | None
    parameters: int
    flops: int | None
    size_bytes: int
    latency: Timing | None = None
    throughput: Timing | None = None
    peak_memory_bytes: int | None = None
    labelled: int = 0
    no_head: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        fast = self.throughput
        return {
            "top1": self.top1,
            "labelled": self.labelled,
            "no_head": self.no_head or None,
            "parameters": self.parameters,
            "flops": self.flops,
            "size_bytes": self.size_bytes,
            "images_per_second": None if fast is None else fast.images_per_second,
            "latency_ms": None if self.latency is None else self.latency.to_json(),
            "batch_ms": None if fast is None else fast.to_json(),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A compressed model on a set of images, beside the original where there is one.

    Args:
        images: how many.
        original: its figures.
        compressed: those of the small model.
        fidelity: of its outputs to the original's.
        intervals: of accuracy, agreement, KL and the paired drop, where there is an original.
        top1: the small model's accuracy with its interval, where there are labels.
        answers: by class, and the images that flip, where there is an original with a head.
        made: date, machine and versions (``provenance.made``).
    """

    images: int
    original: Figures | None
    compressed: Figures
    fidelity: Fidelity | None
    intervals: Final | None = None
    top1: Interval | None = None
    answers: Answers | None = None
    made: Mapping[str, Any] | None = None

    @property
    def speedup(self) -> float | None:
        """How many times as many images per second the small model does, where it was measured."""
        before = None if self.original is None else self.original.throughput
        after = self.compressed.throughput
        return None if before is None or after is None else speedup(before, after)

    @property
    def latency_part(self) -> float | None:
        """The part of the original's time that the small model takes for one image, likewise."""
        before = None if self.original is None else self.original.latency
        after = self.compressed.latency
        return None if before is None or after is None else speedup(after, before)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; fractions, not percent."""
        fidelity = None
        paired = {"speedup": self.speedup, "latency_part": self.latency_part}
        compressed = {**self.compressed.to_json(), **paired}
        if self.fidelity is not None:
            fidelity = {k: v for k, v in asdict(self.fidelity).items() if k != "images"}
        return {
            "images": self.images,
            "original": None if self.original is None else self.original.to_json(),
            "compressed": compressed,
            "fidelity": fidelity,
            "intervals": {
                **({} if self.intervals is None else self.intervals.to_json()),
                "top1_after": None if self.top1 is None else asdict(self.top1),
                "confidence": CONFIDENCE,
            },
            **fields_written(self.answers or Answers()),
            "made": None if self.made is None else dict(self.made),
        }

    def __repr__(self) -> str:
        before, after = self.original, self.compressed
        words = [f"{self.images} images", f"{amount(after.parameters)} parameters"]
        if before is not None:
            words[1] += f" ({share(after.parameters, before.parameters)})"
        if after.top1 is not None:
            of = "" if before is None else f" (original {percent(before.top1)})"
            words.append(f"top-1 {percent(after.top1)}{of}")
        return f"Evaluation({', '.join(words)})"

    def summary(self) -> Summary:
        """One row per figure, original and small model side by side, as the command prints it."""
        return Summary.of(summaries.evaluation(self.to_json()))

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with a row per figure, ``original`` and ``compressed`` columns.

        Fractions are fractions, not percent; ``low`` and ``high`` are the ends of an interval.

        Raises:
            BlockfitError: where pandas is not installed.
        """
        return frame(summaries.evaluation_rows(self.to_json()), ["figure"])

    def plot(self, ax: Any = None) -> Any:
        """Draw what remains of the original: parameters, FLOPs, file, time, memory, accuracy.

        Args:
            ax: matplotlib's axes; a new figure by default.

        Returns:
            The axes.

        Raises:
            BlockfitError: where no original was evaluated beside it, or without matplotlib.
        """
        left = summaries.remaining(self.to_json())
        axis = drawing.axes_of(ax, 5.4, 0.8 + 0.32 * len(left))
        drawing.shares(axis, left)
        return axis

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write what ``blockfit evaluate --json`` prints, which ``blockfit.report`` reads.

        Args:
            path: ends in ``.json``.
            overwrite: replace an evaluation that lies there.

        Raises:
            BlockfitError: where the file is taken or cannot be written.
        """
        with new_file(path, FORM, overwrite) as partial:
            text = json.dumps(self.to_json(), indent=1, allow_nan=False)
            write_text(partial, text + "\n")


class Accuracy:
    """Adds up right answers over batches.

    Args:
        fits: whether the labels may be those of a head of so many classes.
    """

    def __init__(self, fits: Callable[[int], bool] = lambda classes: True) -> None:
        self.right = self.labelled = self.outside = 0
        self._fits = fits

    def add(self, seen: Observation, labels: Tensor | None) -> None:
        """Compare the top class of every labelled image with its label."""
        self.add_counts(self.counted(seen, labels))

    def counted(self, seen: Observation, labels: Tensor | None) -> tuple[int, int, int]:
        """``right_answers``, or none where the labels are not of the head."""
        fits = seen.logits is not None and self._fits(seen.logits.shape[1])
        return right_answers(seen, labels) if fits else (0, 0, 0)

    def add_counts(self, counts: Sequence[int]) -> None:
        """Add what ``counted`` found."""
        self.right += counts[0]
        self.labelled += counts[1]
        self.outside += counts[2]

    @property
    def top1(self) -> float | None:
        """The fraction so far; ``None`` where nothing was labelled.

        Raises:
            BlockfitError: where most labels are no classes of the head.
        """
        if self.outside > self.labelled:
            raise BlockfitError(
                f"{self.outside} of {self.outside + self.labelled} labels are beyond the classes "
                "of the model's head; give images of the model's own classes"
            )
        return self.right / self.labelled if self.labelled else None


@checked
def evaluate(
    compressed: nn.Module,
    data: Images,
    *,
    against: nn.Module | None = None,
    blocks: Blocks | None = None,
    measure: bool = True,
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
) -> Evaluation:
    """``blockfit.evaluate`` of modules and ``Images``: both models over the images once.

    In a run on several processes each takes its own batches, and the first one measures.
    """
    if against is not None and blocks is not None:
        _check_original(against, blocks)
    first = data.first("evaluate on")
    models = {"compressed": compressed} if against is None else {
        "original": against, "compressed": compressed,
    }  # fmt: skip
    places = {
        name: find_blocks(model, placed(model, first_images(first, 2)))
        if blocks is None
        else blocks
        for name, model in models.items()
    }
    accuracies = {name: Accuracy(data.matching.fits) for name in models}
    own, rows, start = data.own(), {}, 0
    if checkpoint is not None and (stored := checkpoint.load("evaluation")) is not None:
        rows, start, unreadable = stored[0]
        data.learn(unreadable)
    for batch in own.batches(start):
        rows[str(batch.number)] = _row(models, places, batch, accuracies)
        start = batch.places[-1] + 1
        progress(sum(row[0] for row in rows.values()), len(own))
        if checkpoint is not None and checkpoint.due():
            checkpoint.save("evaluation", [rows, start, [*data.unreadable.items()]])
    data.exchange()
    found = {int(k): row for part in ranks.gathered(rows) for k, row in part.items()}
    meter = FidelityMeter()
    for _, (_, counts, sums, *_) in sorted(found.items()):  # in order: the same bits however shared
        for name, accuracy in accuracies.items():
            accuracy.add_counts(counts[name])
        if sums is not None:
            meter.add_sums(sums)
    figures = _figures(models, places, accuracies, first, measure and ranks.is_first())
    outcomes = Outcomes.of_rows(row for _, part in sorted(found.items()) for row in part[3])
    answers = [row for _, part in sorted(found.items()) for row in part[4]]
    names = data.class_names or label_names(compressed)
    small = accuracies["compressed"]
    return Evaluation(
        images=sum(row[0] for row in found.values()),
        original=figures.get("original"),
        compressed=figures["compressed"],
        fidelity=None if against is None else meter.result(),
        intervals=final_of(outcomes, data.records.source, data.seed) if len(outcomes) else None,
        top1=wilson(small.right, small.labelled) if small.labelled else None,
        answers=answers_of(answers, names) if answers else None,
        made=made(runs_on(compressed)),
    )


def _check_original(original: nn.Module, blocks: Blocks) -> None:
    try:
        block_modules(original, blocks)
    except BlockfitError as error:
        raise BlockfitError(
            f"the original has no {blocks.depth} blocks at {place(blocks.path)}, where the "
            "compressed model has its own; give the model that it was made from as against="
        ) from error


def _row(
    models: Mapping[str, nn.Module],
    places: Mapping[str, Blocks],
    batch: LabelledBatch,
    accuracies: Mapping[str, Accuracy],
) -> tuple[int, dict[str, tuple[int, int, int]], Sums | None, list[list[float]], list[Answer]]:
    """Of a batch, as JSON: images, right answers and labels of each model, sums of fidelity, and
    ``Outcomes`` and answers where there are two models."""
    seen = {
        name: finite(observe(model, places[name], placed(model, batch.inputs)), name, batch.names)
        for name, model in models.items()
    }
    counts = {name: accuracies[name].counted(one, batch.labels) for name, one in seen.items()}
    if "original" not in seen:
        return len(seen["compressed"].features), counts, None, [], []
    sums = _compared(seen["original"], seen["compressed"])
    known = batch.labels if sum(counts["original"]) else None
    each = rows_of(seen["original"], seen["compressed"], known)
    answers = answers_of_batch(seen["original"], seen["compressed"], known, batch.names)
    return len(seen["compressed"].features), counts, sums, each, answers


def _figures(
    models: Mapping[str, nn.Module],
    places: Mapping[str, Blocks],
    accuracies: Mapping[str, Accuracy],
    batch: Batch,
    measure: bool,
) -> dict[str, Figures]:
    latency = alternate(models, first_images(batch, 1)) if measure else {}
    throughput = alternate(models, batch) if measure else {}
    return {
        name: Figures(
            top1=accuracies[name].top1,
            parameters=parameters(model),
            flops=flops(model, batch),
            size_bytes=size_bytes(model),
            latency=latency.get(name),
            throughput=throughput.get(name),
            peak_memory_bytes=peak_memory(model, batch) if measure else None,
            labelled=accuracies[name].labelled,
            no_head=observe(model, places[name], placed(model, first_images(batch, 1))).no_head,
        )
        for name, model in models.items()
    }


def _compared(original: Observation, compressed: Observation) -> Sums:
    before, after = original.features.shape, compressed.features.shape
    heads = [s.logits.shape for s in (original, compressed) if s.logits is not None]
    if before != after or len(set(heads)) > 1:
        shapes = (before, after) if before != after else heads
        raise BlockfitError(
            f"the two models' outputs differ in shape, {tuple(shapes[0])} and {tuple(shapes[1])}; "
            "compare a compressed model with the original that it was made from"
        )
    like = compressed.features.device
    if original.features.device != like:
        logits = None if original.logits is None else original.logits.to(like)
        original = Observation(original.features.to(like), logits)
    return compared(original, compressed)
