"""The final figures: what a small model is worth on images that decided nothing, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.fit.intervals import CONFIDENCE, Interval, mean_interval, paired_drop, wilson
from blockfit.fit.numerics import exact
from blockfit.models.blocks import Blocks
from blockfit.models.forward import placed
from blockfit.models.head import Observation, observe
from blockfit.progress import Progress, silent
from blockfit.search.fidelity import kl_divergence
from blockfit.search.setting import FEWEST_IMAGES
from blockfit.search.solve import Solution

FINAL_IMAGES = 1000
"""Images of the final figures where many were given; no more than twice the calibration images."""

APART = 0.2
"""Part of the images that is set apart for them where nothing is left beyond the calibration."""


@dataclass(frozen=True)
class Parts:
    """What the images of a run are for; no two parts share one.

    Args:
        calibration: fitted on, and held out to choose the plan.
        judge: decide on a budget of loss; ``None`` where there is none.
        final: for the final figures alone; ``None`` where none are asked for.
        whole: all of them, as they were drawn.
        apart: how the last two were found, for people.
    """

    calibration: Images
    judge: Images | None
    final: Images | None
    whole: Images
    apart: str = ""


def set_apart(
    images: Images, final: int | None = None, judging: bool = False, seed: int = 0
) -> Parts:
    """Divide the images of a run: calibration, the judge of a budget, the final figures.

    Of images beyond those that were drawn for the calibration, up to ``FINAL_IMAGES`` are for the
    final figures (a third of them, where a budget is judged) and the others for the judge. Where
    less than a fifth of all was left beyond, a fifth of all is set apart for each; for the final
    figures only what a calibration can spare.

    Args:
        images: the calibration images, and what lies beyond them.
        final: images for the final figures; 0 for none.
        judging: whether a budget of loss has to be judged.

    Raises:
        BlockfitError: where ``final`` is more than half of the images, or below 0.
    """
    total, beyond = len(images.positions) + len(images.beyond), len(images.beyond)
    if final is not None and not 0 <= final <= total // 2:
        raise BlockfitError(
            f"final= sets images apart for the final figures, from 0 to half of the {total} that "
            f"were given, got {final}"
        )
    fifth = round(APART * total)
    shares = (final != 0) + judging
    if beyond >= shares * fifth and (final or 0) + judging * fifth <= beyond:
        most = beyond // 3 if judging else beyond
        usual = min(FINAL_IMAGES, 2 * len(images.positions), most)
        count = usual if final is None else final
        judges, how = (beyond - count) * judging, "beyond the calibration images"
    else:
        spare = max(0, total - judging * fifth - FEWEST_IMAGES)
        count = min(FINAL_IMAGES, fifth, spare) if final is None else final
        judges, how = fifth * judging, "set apart from the calibration images"
    rest, last = images.apart(count, seed)
    judge = None
    if judges:
        rest, judge = rest.apart(judges, seed)
    return Parts(rest, judge, last if count else None, images, how)


COLUMNS = ("labelled", "before", "after", "kl", "agreement", "feature_error")
"""Of ``Outcomes.table``: labelled or not (−1 is a label that the head does not have), right before
and after, KL and agreement with the original (NaN without a head), relative feature error."""


@dataclass(frozen=True)
class Outcomes:
    """What original and small model said of the same images.

    Args:
        table: shape (images, len(COLUMNS)), float64.
    """

    table: Tensor

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[float]]) -> Outcomes:
        """Those that ``rows_of`` gave, put together."""
        return cls(torch.tensor([*rows], dtype=torch.float64).reshape(-1, len(COLUMNS)))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labelled(self) -> int:
        """Images with a label of the head's classes; 0 where most have one of another set."""
        known = self.column("labelled")
        inside, outside = int((known > 0).sum()), int((known < 0).sum())
        return inside if inside > outside else 0

    @property
    def changes(self) -> tuple[int, int]:
        """Labelled images that only the original answers rightly, and that only the small model
        does."""
        known = self.column("labelled") > 0
        before, after = self.column("before")[known], self.column("after")[known]
        return int((before > after).sum()), int((after > before).sum())

    def column(self, name: str) -> Tensor:
        """One value per image."""
        return self.table[:, COLUMNS.index(name)]

    def joined(self, other: Outcomes) -> Outcomes:
        """Those of both."""
        return Outcomes(torch.cat([self.table, other.table]))


NOTHING = Outcomes(torch.zeros(0, len(COLUMNS), dtype=torch.float64))


def outcomes(
    original: nn.Module,
    small: nn.Module,
    blocks: Blocks,
    images: Images,
    progress: Progress = silent,
    kept: dict[int, Observation] | None = None,
) -> Outcomes:
    """Run both models over the images; the processes of a run share the batches.

    Args:
        kept: what the original says, by the number of the batch: taken from here where it is
            there, and put here where it is not.

    Raises:
        BlockfitError: where an output is NaN or infinite.
    """
    own = images.own()
    rows: dict[str, list[list[float]]] = {}
    for batch in own.batches():
        before = None if kept is None else kept.get(batch.number)
        if before is None:
            seen = observe(original, blocks, placed(original, batch.inputs))
            before = finite(seen, "original", batch.names)
            if kept is not None:
                kept[batch.number] = before
        seen = observe(small, blocks, placed(small, batch.inputs))
        after = finite(seen, "compressed", batch.names)
        known = labels_of_head(before, batch.labels, images)
        rows[str(batch.number)] = rows_of(before, after, known)
        progress(sum(map(len, rows.values())), len(own))
    images.exchange()
    found = {int(k): row for part in ranks.gathered(rows) for k, row in part.items()}
    return Outcomes.of_rows(row for _, part in sorted(found.items()) for row in part)


def labels_of_head(seen: Observation, labels: Tensor | None, images: Images) -> Tensor | None:
    """Labels of a batch as classes of the model's head; ``None`` where they are of another set."""
    if seen.logits is None or labels is None:
        return None
    fits = images.matching.fits(seen.logits.shape[1])
    return labels.to(seen.logits.device) if fits else None


def finite(seen: Observation, name: str, images: list[str]) -> Observation:
    """Refuse outputs that are NaN or infinite: every figure made of them would be void."""
    for tensor in (seen.features, seen.logits):
        if tensor is None:
            continue
        bad = ~torch.isfinite(tensor.reshape(len(tensor), -1)).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            image = images[row] if row < len(images) else f"image {row} of a batch"
            raise BlockfitError(
                f"the output of the model {name!r} holds NaN or infinite values for {image}; "
                "check that image and the model's weights and dtype"
            )
    return seen


def rows_of(before: Observation, after: Observation, labels: Tensor | None) -> list[list[float]]:
    """The rows of ``Outcomes.table`` for one batch, as JSON values."""
    rows = torch.zeros(len(before.features), len(COLUMNS), dtype=torch.float64)
    old, new = exact(before.features).cpu(), exact(after.features).cpu()
    gap = (new - old).reshape(len(old), -1).norm(dim=1)
    rows[:, 5] = gap / old.reshape(len(old), -1).norm(dim=1).clamp_min(1e-30)
    if before.logits is None or after.logits is None:
        rows[:, 3:5] = torch.nan
        return rows.tolist()
    first, second = before.logits.argmax(1).cpu(), after.logits.argmax(1).cpu()
    rows[:, 3] = kl_divergence(before.logits.cpu(), after.logits.cpu())
    rows[:, 4] = (first == second).double()
    if labels is not None:
        labels, classes = labels.cpu(), before.logits.shape[1]
        known = (labels >= 0) & (labels < classes)
        rows[:, 0] = known.double() - (labels >= classes).double()
        rows[:, 1] = (known & (first == labels)).double()
        rows[:, 2] = (known & (second == labels)).double()
    return rows.tolist()


@dataclass(frozen=True)
class Final:
    """Figures of images that decided nothing, each with its ``CONFIDENCE`` interval.

    Args:
        labelled: how many of them have a label of the head's classes.
        source: which images they are.
        top1_before: the original's, a fraction; ``None`` without labels of the head's classes.
        top1_after: the small model's.
        drop: points of top-1 that were lost, on the same images one by one.
        agreement: images of the same class by both; ``None`` without a head.
        kl: KL(original ‖ compressed), in nats; likewise.
        feature_error: ‖f' − f‖ / ‖f‖ of the final features.
    """

    images: int
    labelled: int
    source: str
    top1_before: Interval | None
    top1_after: Interval | None
    drop: Interval | None
    agreement: Interval | None
    kl: Interval | None
    feature_error: Interval

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "confidence": CONFIDENCE}


def final_of(found: Outcomes, source: str, seed: int = 0) -> Final:
    """The figures of outcomes; shares by Wilson, the paired drop by Tango, means by bootstrap."""
    labelled, images = found.labelled, len(found)
    before = after = drop = agreement = kl = None
    if labelled:
        worse, better = found.changes
        drop = paired_drop(worse, better, labelled).in_points()
        before = wilson(int(found.column("before").sum()), labelled)
        after = wilson(int(found.column("after").sum()), labelled)
    if not bool(found.column("kl").isnan().any()):
        agreement = wilson(int(found.column("agreement").sum()), images)
        kl = mean_interval(found.column("kl").numpy(), seed).at_least_0()
    error = mean_interval(found.column("feature_error").numpy(), seed).at_least_0()
    return Final(images, labelled, source, before, after, drop, agreement, kl, error)


def final_figures(
    original: nn.Module,
    small: nn.Module | Solution,
    blocks: Blocks,
    images: Images,
    seed: int = 0,
    apart: str = "",
    progress: Progress = silent,
) -> Final:
    """What a small model is worth on images that were used for nothing else.

    Args:
        small: the model after, or the solution that makes it.
        apart: how the images were found, for people.

    Raises:
        BlockfitError: where an output is NaN or infinite, or no image can be read.
    """
    if isinstance(small, Solution):
        small = small.built(original, blocks, own=False)
    found = outcomes(original, small, blocks, images, progress)
    if not len(found):
        raise BlockfitError("none of the images of the final figures can be read; give others")
    where = f"{images.records.source}, {apart}" if apart else images.records.source
    return final_of(found, where, seed)
