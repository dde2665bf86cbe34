"""What a report shows of pictures: experiments, images side by side, principal components."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

from PIL import Image

from blockfit.evaluation.side_by_side import Prediction, Sample, SideBySide
from blockfit.reports.content import Experiment
from blockfit.units import number

View = dict[str, Any]


def experiment_view(one: Experiment) -> View:
    """One experiment: finding, picture, rows."""
    picture = None
    if one.picture is not None:
        width = Image.open(io.BytesIO(one.picture)).width
        picture = {"data": _data(one.picture), "width": width}
    return {
        "title": one.title,
        "finding": one.finding,
        "picture": picture,
        "header": one.header,
        "rows": one.rows,
    }


def sample_view(sample: Sample) -> View:
    """One image with what both models say of it."""
    sides = (("original", sample.original), ("compressed", sample.compressed))
    said = [
        f"{who} model: {side.classes[0]}" for who, side in sides if side is not None
    ]  # fmt: skip
    return {
        "name": _short(sample.name),
        "picture": _data(sample.picture),
        "alt": "; ".join([f"image {_short(sample.name)}", *said]),
        "label": sample.label,
        "differs": sample.differs,
        "cosine": number(sample.cosine, 3),
        "cost": None if sample.cost is None else number(sample.cost, 3),
        "predictions": [
            {"who": who, "guesses": _guesses(side), "mark": _mark(sample.right, place)}
            for place, (who, side) in enumerate(sides)
            if side is not None
        ],
    }


def _mark(right: tuple[bool, bool] | None, place: int) -> str:
    """``right`` or ``wrong``; nothing without a label."""
    return "" if right is None else ("wrong", "right")[right[place]]


def _short(name: str) -> str:
    """A file's name without its folders."""
    return name.replace("\\", "/").rpartition("/")[2] or name


def _guesses(prediction: Prediction) -> list[View]:
    return [
        {"name": name, "percent": f"{p:.1%}", "part": f"{100 * p:.1f}"}
        for name, p in zip(prediction.classes, prediction.probabilities, strict=True)
    ]


def samples_words(side: SideBySide) -> str:
    """On how many images the models differ, and which are shown."""
    words = f"{len(side.samples)} of {side.images} images from {side.source}. "
    if side.differing is None:
        return words + "The model has no head, so that only features are compared."
    if not side.differing:
        return words + f"The two models name the same class first on all {side.images}."
    shown = sum(sample.differs for sample in side.samples)
    return words + (
        f"The two models name another class first on {side.differing} of the {side.images}; "
        f"the {shown} costliest of these come first, then others."
    )


def pca_view(samples: Iterable[Sample]) -> list[View]:
    """The images whose patch tokens have a grid."""
    return [
        {
            "name": _short(sample.name),
            "picture": _data(sample.picture),
            "original": _data(sample.components[0]),
            "compressed": _data(sample.components[1]),
            "words": f"cosine of the features {sample.cosine:.3f}",
        }
        for sample in samples
        if sample.components is not None
    ]


def pca_words(side: SideBySide) -> str:
    """How the colours come about."""
    part = "" if side.explained is None else f" ({side.explained:.0%} of their variance)"
    return (
        "The patch tokens after the last block: the original's first three principal components"
        f"{part} as red, green and blue. Both models are coloured on the same scale, so that the "
        "same colour means the same feature."
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
