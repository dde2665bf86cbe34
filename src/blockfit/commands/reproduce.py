"""``blockfit reproduce``: the paper's experiments on any model and labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from blockfit import __version__, api
from blockfit.commands import options as opt
from blockfit.commands.output import Output, keeping
from blockfit.commands.reporter import Reporter
from blockfit.data.images import Images
from blockfit.data.splits import Source, train_and_test
from blockfit.errors import BlockfitError
from blockfit.evaluation.paper.judge import JUDGES, Judge, fitting_judge
from blockfit.evaluation.paper.lab import FULL, QUICK, Draw, Lab, Settings
from blockfit.evaluation.paper.study import BY_NAME, INDEX, chosen, earlier
from blockfit.evaluation.paper.study import reproduce as run_experiments
from blockfit.models.blocks import Batch, Blocks, find_blocks
from blockfit.models.cost import parameters
from blockfit.models.load import source_of
from blockfit.models.surgery import removed_plan
from blockfit.models.tensors import fingerprint

QUICK_TEST, QUICK_TRAIN = 300, 2000
"""Test images, and images that a probe learns from, with ``--quick``."""

ModelName = Annotated[
    str,
    opt.option("--model", help="A model folder, a Hub id, timm/NAME, …, or demo.", panel=opt.DATA),
]
Data = Annotated[
    str | None,
    opt.option("--data", help="Labelled images with a training and a test part.", panel=opt.DATA),
]
TrainData = Annotated[
    str | None, opt.option("--train", help="The training part, by itself.", panel=opt.DATA)
]
TestPart = Annotated[
    str | None, opt.option("--test", help="The test part, by itself.", panel=opt.DATA)
]
Transfer = Annotated[
    list[str] | None,
    opt.option("--transfer", help="Other images to fit maps on. Repeatable.", panel=opt.DATA),
]
TrainLimit = Annotated[
    int | None,
    opt.option("--train-limit", help="Draw this many images for probes.", panel=opt.DATA),
]
TestLimit = Annotated[
    int | None, opt.option("--test-limit", help="Draw this many test images.", panel=opt.DATA)
]
Names = Annotated[
    str | None,
    opt.option("--experiments", help=f"Some of {','.join(BY_NAME)}.", panel=opt.HOW),
]
Quick = Annotated[
    bool,
    opt.option("--quick", help="Fewer images, spans and sizes: minutes on a CPU.", panel=opt.HOW),
]
JudgeName = Annotated[
    str | None,
    opt.option(
        "--judge", help=f"{', '.join(JUDGES)}; head where it fits the labels.", panel=opt.HOW
    ),
]
Calibration = Annotated[
    int | None,
    opt.option("--limit", help=f"Calibration images: {FULL.calibration}.", panel=opt.HOW),
]
Samples = Annotated[
    str | None,
    opt.option("--samples", help="Numbers of images to compare, such as 50,500.", panel=opt.HOW),
]
Seeds = Annotated[
    int | None,
    opt.option("--seeds", help=f"Draws to average over: {FULL.seeds}.", panel=opt.HOW),
]
Output_ = Annotated[Path, opt.option("--output", "-o", help="Folder to write.", panel=opt.OUT)]


def reproduce(
    context: typer.Context,
    model: ModelName,
    data: Data = None,
    train: TrainData = None,
    test: TestPart = None,
    transfer: Transfer = None,
    experiments: Names = None,
    quick: Quick = False,
    judge: JudgeName = None,
    limit: Calibration = None,
    samples: Samples = None,
    seeds: Seeds = None,
    train_limit: TrainLimit = None,
    test_limit: TestLimit = None,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 32,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    workers: opt.Workers = 0,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    blocks: opt.BlocksPath = None,
    output: Output_ = Path("reproduction"),
    report: opt.ReportFile = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Run the paper's experiments: tables, pictures and an index page."""
    out = Output(as_json, quiet)
    page = Reporter(report)
    wanted = chosen(experiments)
    settings = _settings(quick, limit, samples, seeds, seed)
    if (data is None) == (train is None or test is None):
        raise BlockfitError("give --data, or both --train and --test")
    earlier(output)  # refuses a folder that is taken before anything is loaded
    how: dict[str, Any] = {"batch_size": batch_size, **opt.reading(context)}
    columns = (image_column, label_column)
    learn: Source
    judged: Source
    if data is not None:
        if train is not None or test is not None:
            raise BlockfitError("give --data, or --train and --test, not both")
        learn, judged = train_and_test(data, *columns)
    else:
        assert train is not None
        assert test is not None
        learn, judged = train, test
    if quick:
        test_limit = QUICK_TEST if test_limit is None else test_limit
        train_limit = QUICK_TRAIN if train_limit is None else train_limit
    with out.working(), keeping(lambda: f"the experiments that were finished are in {output}"):
        out.say(f"loading {model}")
        loaded = api.load(model, device=opt.device(device), **opt.loading(context))
        pictures = api.images(judged, loaded, limit=test_limit, seed=seed, **how)
        example = _example(pictures)
        where = find_blocks(loaded, example, blocks)
        if done := removed_plan(loaded, where):
            raise BlockfitError(
                f"the model is compressed already ({done}); give the original instead"
            )
        kind = judge or fitting_judge(loaded, where, example, pictures.class_names)
        labelled = None
        if kind != "head":
            labelled = api.images(learn, loaded, limit=train_limit, seed=seed, **how)
        lab = Lab(
            loaded,
            where,
            settings.fitting(where.depth),
            _draw(learn, loaded, how),
            Judge(loaded, where, pictures, kind, labelled, progress=out.count),
            _transfers(transfer or (), loaded, how),
            out.say,
            out.count,
        )
        about = _about(loaded, where, lab.draw(1, seed), pictures, kind, labelled)
        out.note(f"{where.depth} blocks of width {where.width}; judged by: {about['judge']}")
        result = run_experiments(lab, output, about, wanted, lambda line: out.warn([line]))
        page.reproduced(out, output)
    for name, entry in result["experiments"].items():
        out.line(f"{name} ({entry['seconds']:.0f} s): {entry['finding']}")
    out.line(f"written to {output / INDEX}")
    page.tell(out)
    out.result({**result, "output": str(output)})


def _settings(
    quick: bool, limit: int | None, samples: str | None, seeds: int | None, seed: int
) -> Settings:
    base = replace(QUICK if quick else FULL, seed=seed)
    if limit is not None:
        base = replace(base, calibration=limit)
    if seeds is not None:
        base = replace(base, seeds=seeds)
    if samples is not None:
        parts = [part.strip() for part in samples.split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            raise BlockfitError(f"cannot read --samples {samples!r}; write numbers, such as 50,500")
        numbers = tuple(sorted({int(part) for part in parts}))
        base = replace(base, samples=numbers, positions=numbers)
    return base


def _draw(source: Source, model: nn.Module, how: dict[str, Any]) -> Draw:
    def draw(count: int, seed: int) -> Images:
        return api.images(source, model, limit=count, seed=seed, **how)

    return draw


def _train_part(name: str) -> Source:
    """The training part where there is one; a folder of photographs as it is."""
    try:
        return train_and_test(name)[0]
    except BlockfitError:
        return name


def _example(images: Images) -> Batch:
    """The first batch.

    Raises:
        BlockfitError: where there is none, or its images have no labels.
    """
    first = next(images.batches(), None)
    if first is None:
        raise BlockfitError(
            f"{images.records.source} holds no images that can be read; give others"
        )
    if first.labels is None:
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
        "version": __version__,
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
    "probe-new": "probe-new (a linear probe learnt anew from each model's features, as the paper)",
}
