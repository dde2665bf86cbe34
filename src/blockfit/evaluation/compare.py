"""Any number of models on the same images: accuracy, paired differences, classes, flipped images.

Differences are from one of the models, the reference, and are taken image by image. Each model
gets the images as its own preprocessing makes them; models that agree on it share one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.data.images import Images, LabelledBatch
from blockfit.errors import BlockfitError
from blockfit.evaluation.summaries import comparison
from blockfit.fit.intervals import CONFIDENCE, Interval, mean_interval, paired_drop, wilson
from blockfit.fit.numerics import exact
from blockfit.models.blocks import Blocks
from blockfit.models.cost import flops, parameters, size_bytes
from blockfit.models.forward import first_images, placed
from blockfit.models.head import Observation, observe
from blockfit.models.load import label_names, source_of
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.stages import find_blocks
from blockfit.progress import Progress, silent
from blockfit.search.fidelity import kl_divergence
from blockfit.search.final import finite
from blockfit.summary import Summary, frame

COLUMNS = ("known", "right", "answer", "agrees", "kl", "feature_error")
"""Of an image by one model: whether its label is a class of the head, whether the answer is right,
the answer's number (−1 without a head), and how it compares with the reference (NaN: it cannot)."""


@dataclass(frozen=True)
class Entrant:
    """A model to compare.

    Args:
        model: any module with blocks.
        images: prepared and labelled for it; the same ones, in the same order, for all models.
        blocks: where its blocks are; found by looking where ``None``.
    """

    model: nn.Module
    images: Images
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Compared:
    """One model's size and accuracy, and its differences from the reference.

    Args:
        flops: of one image; ``None`` where they cannot be counted.
        size_bytes: of the weights file that it is saved as.
        labelled: images whose label is a class of its head.
        no_head: why no head was recognised, so that it has no accuracy; empty where one was.
        top1: a fraction of the labelled images; ``None`` without labels or head.
        drop: points of top-1 below the reference, paired; ``None`` for the reference itself and
            where fewer than both have an accuracy.
        agreement: fraction of images with the reference's answer; ``None`` where the heads have
            different classes.
        kl: KL(reference ‖ model) in nats; ``None`` also where the two prepare images differently.
        feature_error: ‖f' − f‖ / ‖f‖ of the final features; ``None`` also for other widths.
        lost: images that only the reference answers rightly.
        gained: images that only this model does.
    """

    parameters: int
    flops: int | None
    size_bytes: int
    labelled: int
    no_head: str
    top1: Interval | None
    drop: Interval | None = None
    agreement: Interval | None = None
    kl: Interval | None = None
    feature_error: Interval | None = None
    lost: int = 0
    gained: int = 0


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Args:
        name: of the class, in the reference's words.
        images: how many have it as their label.
        top1: model → fraction of them that it answers rightly.
        drop: model → points below the reference, paired; without the reference.
    """

    name: str
    images: int
    top1: dict[str, Interval]
    drop: dict[str, Interval]

    @property
    def worst(self) -> float:
        """The largest fall of any model, in points."""
        return max((drop.value for drop in self.drop.values()), default=0.0)


@dataclass(frozen=True)
class Disagreement:
    """One image on which some model does not do as the reference does.

    Args:
        answers: model → class that it names first.
        lost: models that answer it wrongly where the reference is right.
        gained: models that answer it rightly where the reference is wrong.
    """

    image: str
    label: str | None
    answers: dict[str, str]
    lost: tuple[str, ...]
    gained: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Models side by side.

    Args:
        reference: the model that the others are compared with.
        models: by name, in the order in which they were given.
        classes: those that lose most first; empty without labels.
        flips: with labels, the images that one model answers rightly and another does not; without,
            those that get several answers. Lost ones first.
    """

    reference: str
    images: int
    source: str
    models: dict[str, Compared]
    classes: tuple[ClassRow, ...]
    flips: tuple[Disagreement, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; fractions, but ``drop`` in points."""
        return {**asdict(self), "confidence": CONFIDENCE}

    def summary(self, whole: bool = False) -> Summary:
        """Tables for terminals and notebooks."""
        return Summary.of(comparison(self.to_json(), whole))

    def to_frame(self) -> Any:
        """A row per model as a ``pandas.DataFrame``: sizes, figures, and ends of their intervals.

        Raises:
            BlockfitError: where pandas is not installed.
        """
        rows = []
        for name, one in self.models.items():
            row: dict[str, Any] = {"model": name}
            for key, value in asdict(one).items():
                if isinstance(value, dict):
                    row |= {key: value["value"]}
                    row |= {f"{key}_{end}": value[end] for end in ("low", "high")}
                else:
                    row[key] = value
            rows.append(row)
        return frame(rows, ["model"])

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def __repr__(self) -> str:
        return (
            f"Comparison({', '.join(self.models)}; {self.images} images, against "
            f"{self.reference}; {len(self.flips)} flips)"
        )


def compare(
    entrants: Mapping[str, Entrant],
    against: str | None = None,
    progress: Progress = silent,
) -> Comparison:
    """``blockfit.compare`` of models with their images, each figure with its interval.

    Shares have Wilson's interval, paired drops Tango's, means a bootstrap's. In a run on several
    processes each takes its own batches.
    """
    reference = _reference(entrants, against)
    examples = {name: one.images.first("compare on") for name, one in entrants.items()}
    walks = _walks(entrants)
    total = sum(len(entrants[names[0]].images) for names in walks)
    seen = {name: _Seen(one, examples[name]) for name, one in entrants.items()}
    seen[reference].classes_of(seen)
    done = 0
    for names in walks:
        images = entrants[names[0]].images
        own, rows = images.own(), _Rows()
        for batch in own.batches():
            rows.add(batch, _observed(batch, {n: seen[n] for n in names}, reference), images)
            done += len(batch.names)
            progress(min(done, total), total)
        images.exchange()
        for name in names:
            seen[name].rows = rows.of(name)
    return _result(seen, reference, entrants)


def preparing(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Whose preprocessing and class names each model takes: its own, or else the first other's."""
    told = [model for model in models.values() if source_of(model).preprocessing is not None]
    return {
        name: told[0] if told and source_of(model).preprocessing is None else model
        for name, model in models.items()
    }


def _reference(entrants: Mapping[str, Entrant], against: str | None) -> str:
    if len(entrants) < 2:
        raise BlockfitError("there is one model; give two or more to compare")
    if against is not None and against not in entrants:
        raise BlockfitError(f"against={against} is none of the models: {', '.join(entrants)}")
    first, *others = (one.images for one in entrants.values())
    for images in others:
        if not np.array_equal(images.positions, first.positions):
            raise BlockfitError("the models have different images; give the same to all of them")
    return against or max(entrants, key=lambda name: parameters(entrants[name].model))


def _walks(entrants: Mapping[str, Entrant]) -> list[list[str]]:
    """Names of the models that take equal inputs with equal labels, a list per pass."""
    walks: dict[Any, list[str]] = {}
    for name, one in entrants.items():
        how, matching = one.images.preprocessing, one.images.matching
        told = (how.kind, repr(how.settings)) if isinstance(how, Preprocessing) else id(how)
        numbers = None if matching.number is None else tuple(sorted(matching.number.items()))
        walks.setdefault((told, numbers, matching.classes), []).append(name)
    return list(walks.values())


class _Seen:
    """One model on its way through the images."""

    def __init__(self, one: Entrant, example: Any) -> None:
        self.model, self.images, self.example = one.model, one.images, example
        few = placed(one.model, first_images(example, 2))
        self.blocks = find_blocks(one.model, few) if one.blocks is None else one.blocks
        first = observe(one.model, self.blocks, few)
        self.no_head = first.no_head
        self.classes = None if first.logits is None else first.logits.shape[1]
        self.names = one.images.class_names or label_names(one.model)
        self.same_classes = True
        self.rows: dict[int, list[Any]] = {}

    def classes_of(self, others: Mapping[str, _Seen]) -> None:
        """Say of every model whether its answers are of this model's classes."""
        for other in others.values():
            same_names = None in (self.names, other.names) or self.names == other.names
            other.same_classes = self.classes == other.classes and same_names

    def answer(self, number: int) -> str:
        """What to call a class."""
        if self.names and 0 <= number < len(self.names):
            return self.names[number]
        return "–" if number < 0 else f"class {number}"


def _observed(
    batch: LabelledBatch, models: Mapping[str, _Seen], reference: str
) -> dict[str, tuple[Observation, Observation | None, bool]]:
    """What every model says, beside what the reference says of the same inputs where it runs, and
    whether both answer with the same classes."""
    found = {
        name: finite(observe(one.model, one.blocks, placed(one.model, batch.inputs)), name,
                     batch.names)
        for name, one in models.items()
    }  # fmt: skip
    first = found.get(reference)
    return {n: (one, first, models[n].same_classes) for n, one in found.items()}


class _Rows:
    """What one pass finds: model → place of the image → its name, label and ``COLUMNS``."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[Any]]] = {}

    def add(
        self,
        batch: LabelledBatch,
        seen: Mapping[str, tuple[Observation, Observation | None, bool]],
        images: Images,
    ) -> None:
        for name, (one, first, same) in seen.items():
            rows = _columns(one, first, same, batch.labels, images)
            label = [-1] * len(rows) if batch.labels is None else batch.labels.tolist()
            kept = self.found.setdefault(name, {})
            for place, image, number, row in zip(
                batch.places, batch.names, label, rows, strict=True
            ):
                kept[str(place)] = [image, number, *row]

    def of(self, name: str) -> dict[int, list[Any]]:
        """Of all processes, in the order of the images."""
        parts = ranks.gathered(self.found.get(name, {}))
        merged = {int(place): row for part in parts for place, row in part.items()}
        return dict(sorted(merged.items()))


def _columns(
    one: Observation,
    first: Observation | None,
    same: bool,
    labels: Tensor | None,
    images: Images,
) -> list[list[float]]:
    count = len(one.features)
    table = np.full((count, len(COLUMNS)), math.nan)
    table[:, :3] = 0, 0, -1
    if one.logits is not None:
        answer = one.logits.argmax(1).cpu()
        table[:, 2] = answer.numpy()
        classes = one.logits.shape[1]
        if labels is not None and images.matching.fits(classes):
            known = (labels >= 0) & (labels < classes)
            table[:, 0], table[:, 1] = known.numpy(), (known & (answer == labels.cpu())).numpy()
    if first is not None:
        if same and one.logits is not None and first.logits is not None:
            old, new = first.logits.cpu(), one.logits.cpu()
            table[:, 3] = (old.argmax(1) == new.argmax(1)).double().numpy()
            table[:, 4] = kl_divergence(old, new).numpy()
        old, new = (exact(seen.features).cpu().reshape(count, -1) for seen in (first, one))
        if old.shape == new.shape:
            size = old.norm(dim=1).clamp_min(1e-30)
            table[:, 5] = ((new - old).norm(dim=1) / size).numpy()
    return table.tolist()


def _result(
    seen: Mapping[str, _Seen], reference: str, entrants: Mapping[str, Entrant]
) -> Comparison:
    """The figures of what all models saw."""
    places = set.intersection(*(set(one.rows) for one in seen.values()))
    order = sorted(places)
    if not order:
        raise BlockfitError("none of the images can be read; give others")
    tables = {
        name: np.array([one.rows[place][2:] for place in order], dtype=np.float64)
        for name, one in seen.items()
    }
    images, first = entrants[reference].images, tables[reference]
    models = {
        name: _compared(one, tables[name], None if name == reference else first, images.seed)
        for name, one in seen.items()
    }
    base = seen[reference]
    labels = np.array([base.rows[place][1] for place in order])
    classes = [
        _class_row(base.answer(int(number)), labels == number, tables, reference)
        for number in np.unique(labels[labels >= 0])
    ]
    rows = tuple(row for row in sorted(classes, key=lambda row: (-row.worst, row.name)) if row.top1)
    flips = _flips(seen, tables, reference, order)
    return Comparison(reference, len(order), images.records.source, models, rows, flips)


def _compared(one: _Seen, table: np.ndarray, first: np.ndarray | None, seed: int) -> Compared:
    known = table[:, 0] > 0
    labelled = int(known.sum())
    more: dict[str, Any] = {}
    if first is not None:
        both = known & (first[:, 0] > 0)
        more = _paired(table[both, 1], first[both, 1])
        if one.same_classes and one.classes is not None:
            same = table[:, 2] == first[:, 2]
            more["agreement"] = wilson(int(same.sum()), len(same))
        for name, column in (("kl", 4), ("feature_error", 5)):
            if not np.isnan(table[:, column]).any():
                more[name] = mean_interval(table[:, column], seed).at_least_0()
    return Compared(
        parameters(one.model),
        flops(one.model, one.example),
        size_bytes(one.model),
        labelled,
        one.no_head,
        wilson(int(table[known, 1].sum()), labelled) if labelled else None,
        **more,
    )


def _paired(right: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Points lost and images won and lost, of images that both models can answer."""
    if not len(right):
        return {}
    lost, gained = int((before > right).sum()), int((right > before).sum())
    drop = paired_drop(lost, gained, len(right)).in_points()
    return {"lost": lost, "gained": gained, "drop": drop}


def _class_row(
    name: str, of_class: np.ndarray, tables: Mapping[str, np.ndarray], reference: str
) -> ClassRow:
    top1, drop = {}, {}
    for model, table in tables.items():
        here = table[of_class]
        known = here[:, 0] > 0
        if not known.any():
            continue
        top1[model] = wilson(int(here[known, 1].sum()), int(known.sum()))
        first = tables[reference][of_class]
        both = known & (first[:, 0] > 0)
        if model != reference and (paired := _paired(here[both, 1], first[both, 1])):
            drop[model] = paired["drop"]
    return ClassRow(name, int(of_class.sum()), top1, drop)


def _flips(
    seen: Mapping[str, _Seen], tables: Mapping[str, np.ndarray], reference: str, order: list[int]
) -> tuple[Disagreement, ...]:
    """With labels the images that some model wins or loses; without, those it names otherwise."""
    first = tables[reference]
    labelled = bool((first[:, 0] > 0).any())
    others = [name for name in tables if name != reference]
    found = []
    for row, place in enumerate(order):
        apart = {
            name: tables[name][row, 1] - first[row, 1]
            for name in others
            if tables[name][row, 0] > 0 and first[row, 0] > 0
        }
        lost, gained = (_names(apart, sign) for sign in (-1, 1))
        differ = any(seen[n].same_classes and tables[n][row, 2] != first[row, 2] for n in others)
        if not (lost or gained) and (labelled or not differ):
            continue
        name, label = seen[reference].rows[place][:2]
        answers = {n: seen[n].answer(int(table[row, 2])) for n, table in tables.items()}
        of_class = seen[reference].answer(label) if label >= 0 else None
        found.append(Disagreement(name, of_class, answers, lost, gained))
    return tuple(sorted(found, key=lambda flip: (-len(flip.lost), len(flip.gained))))


def _names(apart: Mapping[str, float], sign: int) -> tuple[str, ...]:
    return tuple(name for name, change in apart.items() if change == sign)
