"""``blockfit evaluate``: what a model is worth, beside the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import blockfit
from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output

if TYPE_CHECKING:
    from torch import nn

    from blockfit.checkpoint import Checkpoint
    from blockfit.data.images import Images

Protocol = Annotated[
    list[str] | None,
    opt.option(
        "--protocol",
        "Judge as well by knn, probe, probe-sgd, retrieval, zero-shot, dense. Repeatable.",
        opt.HOW,
        "NAME",
    ),
]
Train = Annotated[
    str | None, opt.option("--train", "Labelled, for --protocol to learn from.", opt.DATA, "DATA")
]
TrainLimit = Annotated[
    int | None, opt.rare("--train-limit", "Draw so many of --train.", opt.DATA, "N")
]
Classes = Annotated[
    Path | None,
    opt.rare("--classes", "Class names for zero-shot, one per line.", opt.DATA, "FILE"),
]
Prompts = Annotated[
    list[str] | None,
    opt.rare("--prompt", "For zero-shot, {} is the class name. Repeatable.", opt.HOW, "TEXT"),
]
Masks = Annotated[
    str | None,
    opt.rare("--masks", "For dense: a folder, or a column of --images.", opt.DATA, "NAME"),
]


NoSpeed = Annotated[bool, opt.option("--no-speed", "Leave time and memory unmeasured.", opt.HOW)]


@command(
    "Look",
    "blockfit evaluate small/ --against MODEL --images TEST_IMAGES",
    {"--data": "--images"},
)
def evaluate(
    out: Output,
    small: opt.Small,
    reading: opt.Reading,
    loading: opt.Loading,
    written: opt.Written,
    images: opt.MaybePictures = None,
    against: opt.Against = None,
    protocol: Protocol = None,
    train: Train = None,
    train_limit: TrainLimit = None,
    classes: Classes = None,
    prompt: Prompts = None,
    masks: Masks = None,
    no_speed: NoSpeed = False,
    blocks: opt.BlocksPath = None,
    resume: opt.Resume = False,
) -> None:
    """Measure accuracy, size, speed and fidelity to the original."""
    from blockfit.commands.protocols import Wanted
    from blockfit.data.paths import check_there
    from blockfit.evaluation.summaries import evaluation

    wanted = Wanted(tuple(dict.fromkeys(protocol or ())), train, classes, prompt, masks)
    wanted.check(by_images=images is not None and written.texts is None)
    written.need_data(images)
    if images is not None:
        check_there(images)
    out.expect(outlook.of_pass("evaluating"))
    with out.working():
        out.say(f"loading {small}")
        compressed, where = loading.load_small(small)
        original = None if against is None else loading.load(against)
        prepared = _says_how(compressed, original, written)
        pictures = written.open(images, prepared, reading)
        out.show_images(pictures, loading.place())
        out.warn(_known(compressed, pictures))
        if blocks is not None:
            where = blockfit.find_blocks(compressed, next(iter(pictures), None), blocks)
        out.say("evaluating")
        models = {"original": original, "compressed": compressed}
        checkpoint = _checkpoint(small, models, pictures) if resume else None
        worth = blockfit.evaluate(
            compressed,
            pictures,
            against=original,
            blocks=where,
            measure=not no_speed,
            progress=out.count,
            checkpoint=checkpoint,
        ).to_json()
        if wanted.protocols and images is not None:
            learn = reading.open(train, prepared, limit=train_limit) if train else None
            if learn is not None:
                out.show_images(learn)
            worth["protocols"] = wanted.judge(out, models, where, learn, pictures, images)
        if checkpoint is not None:
            checkpoint.forget()
    out.show(evaluation(worth))
    out.result(worth)


def _says_how(compressed: nn.Module, original: nn.Module | None, written: opt.Written) -> nn.Module:
    """Whose preprocessing is used: the small model's own; the original's where it has none."""
    from blockfit.models.load import source_of

    if original is None:
        return compressed
    if written.texts is not None:
        return original  # whose folder has the tokenizer
    return compressed if source_of(compressed).preprocessing is not None else original


def _known(compressed: nn.Module, pictures: Images) -> list[str]:
    """What to tell where a model is judged by the images that it was made with."""
    calibrated = getattr(compressed, "blockfit_report", {}).get("calibration", {})
    source = pictures.records.source
    if calibrated.get("source") != source or not Path(source).exists():
        return []
    return [
        f"the model was calibrated on {calibrated.get('drawn')} of the images of {source}; figures "
        "for others may be worse"
    ]


def _checkpoint(name: str, models: Mapping[str, nn.Module | None], images: Images) -> Checkpoint:
    """Where the progress of an evaluation lies: beside the model, or here where it is no file."""
    from blockfit.checkpoint import Checkpoint, place_beside, settled
    from blockfit.files import resolved
    from blockfit.models.tensors import fingerprint

    path = resolved(name)
    target = path if path.exists() else resolved(name.replace("/", "_"))
    run = {
        "rows": 2,  # what a batch leaves: answers by image since 2
        "models": {k: None if m is None else fingerprint(m) for k, m in models.items()},
        "images": settled(images.description(), images.digest()),
        "batch_size": images.batch_size,
    }
    return Checkpoint(place_beside(target.with_name(f"{target.name}.evaluate")), run)
