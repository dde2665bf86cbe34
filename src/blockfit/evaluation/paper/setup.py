"""From a model and labelled images to a laboratory in which the experiments run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from blockfit.data.images import Images
from blockfit.data.images import images as open_images
from blockfit.data.records import Columns
from blockfit.data.splits import Source, train_and_test
from blockfit.errors import BlockfitError
from blockfit.evaluation.paper.judge import Judge, fitting_judge
from blockfit.evaluation.paper.lab import FULL, QUICK, Draw, Lab, Settings
from blockfit.models.blocks import Batch, Blocks, find_chain
from blockfit.models.cost import parameters
from blockfit.models.load import source_of
from blockfit.models.surgery import removed_plan
from blockfit.models.tensors import fingerprint
from blockfit.progress import Progress, Say
from blockfit.provenance import installed_versions

QUICK_TEST, QUICK_TRAIN = 300, 2000
"""Test images, and images that a probe learns from, where it shall be quick."""


def settings_for(
    quick: bool = False,
    limit: int | None = None,
    samples: Sequence[int] | None = None,
    seeds: int | None = None,
    seed: int = 0,
) -> Settings:
    """How much is measured; what is not given is as in the paper, or less where ``quick``."""
    base = replace(QUICK if quick else FULL, seed=seed)
    if limit is not None:
        base = replace(base, calibration=limit)
    if seeds is not None:
        base = replace(base, seeds=seeds)
    if samples is not None:
        numbers = tuple(sorted(set(samples)))
        base = replace(base, samples=numbers, positions=numbers)
    return base


@dataclass(frozen=True)
class Sources:
    """Where the images come from.

    Args:
        learn: maps are fitted on images of it, and probes learn from it.
        judged: on these the models are judged.
        reading: other options of ``blockfit.images``, such as ``batch_size``.
    """

    learn: Source
    judged: Source
    transfer: Sequence[str] = ()
    train_limit: int | None = None
    test_limit: int | None = None
    reading: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, data: str | None, train: str | None, test: str | None, *, quick: bool, **more: Any
    ) -> Sources:
        """Both parts of ``data``, or ``train`` and ``test`` by themselves.

        Raises:
            BlockfitError: where both ways are given, or neither.
        """
        if data is None and train is not None and test is not None:
            learn: Source = train
            judged: Source = test
        elif data is not None and train is None and test is None:
            columns = (more["reading"].get(name) for name in ("image_column", "label_column"))
            learn, judged = train_and_test(data, Columns(*columns))
        else:
            raise BlockfitError(
                "give labelled images with both parts, or a train and a test part by themselves"
            )
        if quick:
            for name, usual in (("test_limit", QUICK_TEST), ("train_limit", QUICK_TRAIN)):
                more[name] = usual if more.get(name) is None else more[name]
        return cls(learn, judged, **more)


def prepare(
    model: nn.Module,
    sources: Sources,
    settings: Settings,
    *,
    judge: str | None = None,
    blocks: str | None = None,
    say: Say,
    progress: Progress,
    reads: Callable[[Images], None] = lambda images: None,
) -> tuple[Lab, dict[str, Any]]:
    """A laboratory for ``model``, and what all its experiments share, as JSON values.

    Args:
        judge: one of ``JUDGES``; the head where it fits the labels, else a probe.
        reads: called with the images of the test, of the calibration, and of probes.

    Raises:
        BlockfitError: for a compressed model, images without labels, or none.
    """
    how = {**sources.reading, "seed": settings.seed}
    pictures = open_images(sources.judged, model, limit=sources.test_limit, **how)
    example = _example(pictures)
    reads(pictures)
    where = find_chain(model, example, blocks)
    if done := removed_plan(model, where):
        raise BlockfitError(f"the model is compressed already ({done}); give the original instead")
    kind = judge or fitting_judge(model, where, example, pictures)
    labelled = None
    if kind != "head":
        labelled = open_images(sources.learn, model, limit=sources.train_limit, **how)
        reads(labelled)
    lab = Lab(
        model,
        where,
        settings.fitting(where.depth),
        _told_once(_draw(sources.learn, model, sources.reading), reads),
        Judge(model, where, pictures, kind, labelled, progress=progress),
        _transfers(sources.transfer, model, sources.reading),
        say,
        progress,
    )
    about = _about(model, where, lab.draw(1, settings.seed), pictures, kind, labelled)
    return lab, about


def _draw(source: Source, model: nn.Module, how: dict[str, Any]) -> Draw:
    def draw(count: int, seed: int) -> Images:
        return open_images(source, model, limit=count, seed=seed, **how)

    return draw


def _told_once(draw: Draw, reads: Callable[[Images], None]) -> Draw:
    """``draw``, which hands its first images of more than one on to ``reads``."""
    told: list[Images] = []

    def drawn(count: int, seed: int) -> Images:
        images = draw(count, seed)
        if count > 1 and not told:
            told.append(images)
            reads(images)
        return images

    return drawn


def _train_part(name: str) -> Source:
    """The training part where there is one; a folder of photographs as it is."""
    try:
        return train_and_test(name)[0]
    except BlockfitError:
        return name


def _example(images: Images) -> Batch:
    """The first batch."""
    first = next(images.batches(), None)
    if first is None:
        raise BlockfitError(
            f"{images.records.source} holds no images that can be read; give others"
        )
    if first.labels is None and first.own_labels is None:
        raise BlockfitError(
            f"{images.records.source} has images without a label; give labelled ones"
        )
    return first.inputs


def _transfers(names: Iterable[str], model: nn.Module, how: dict[str, Any]) -> dict[str, Draw]:
    """Sources by what tables call them, the last part of a path; each must hold an image."""
    found: dict[str, Draw] = {}
    for name in names:
        short = Path(name).name if Path(name).exists() else name
        draw = _draw(_train_part(name), model, how)
        if next(iter(draw(1, 0)), None) is None:
            raise BlockfitError(f"{name} holds no images that can be read; give others")
        found[name if short in found else short] = draw
    return found


def _about(
    model: nn.Module,
    blocks: Blocks,
    train: Images,
    test: Images,
    kind: str,
    labelled: Images | None,
) -> dict[str, Any]:
    """What all experiments of a folder share."""
    learnt = "" if labelled is None else f", probes learn from {len(labelled)} images"
    told = test.description()
    return {
        "version": installed_versions()["blockfit"],
        "model": {
            "name": source_of(model).name,
            "fingerprint": fingerprint(model),
            "parameters": parameters(model),
            "blocks": blocks.path,
            "depth": blocks.depth,
            "width": blocks.width,
        },
        "train": {"source": train.records.source, "total": train.records.size},
        "test": {"source": told["source"], "images": len(test), "seed": told["seed"]},
        "judge": f"{_JUDGED[kind]}{learnt}",
        "preprocessing": told["preprocessing"],
    }


_JUDGED: dict[str, str] = {
    "head": "head (the model's own)",
    "probe-fixed": "probe-fixed (a linear probe learnt from the original's features and kept)",
    "probe-new": "probe-new (a linear probe learnt again from each model's features, as the paper)",
}
