"""``blockfit reproduce``: the paper's experiments on any model and labelled images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import blockfit
from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output, keeping
from blockfit.errors import BlockfitError

Calibration = Annotated[int | None, opt.option("--limit", "Calibration images: 500.", opt.HOW, "N")]
Output_ = Annotated[Path, opt.option("--output", "Folder to write.", opt.OUT, "FOLDER", "-o")]


@dataclass(frozen=True)
class Reading(opt.Reading):
    """``--limit`` is of the calibration images."""

    limit: Calibration = None


@dataclass(frozen=True)
class Study:
    """Which experiments, on which images, and how much of them."""

    images: Annotated[
        str | None, opt.option("--images", "Labelled, with both parts.", opt.DATA, "DATA")
    ] = None
    train: Annotated[
        str | None, opt.option("--train", "The training part by itself.", opt.DATA, "DATA")
    ] = None
    test: Annotated[
        str | None, opt.option("--test", "The test part by itself.", opt.DATA, "DATA")
    ] = None
    transfer: Annotated[
        list[str] | None,
        opt.option("--transfer", "Others to fit maps on. Repeatable.", opt.DATA, "DATA"),
    ] = None
    experiments: Annotated[
        str | None,
        opt.option(
            "--experiments",
            "Some of similarity,spans,several,translators,samples,positions,transfer,seeds.",
            opt.HOW,
            "LIST",
        ),
    ] = None
    quick: Annotated[
        bool, opt.option("--quick", "Minutes on a CPU: less of everything.", opt.HOW)
    ] = False
    judge: Annotated[
        str | None,
        opt.option("--judge", "head, probe-fixed, probe-new; head where it fits.", opt.HOW, "NAME"),
    ] = None
    samples: Annotated[
        str | None, opt.rare("--samples", "Numbers of images to compare: 50,500.", opt.HOW, "LIST")
    ] = None
    seeds: Annotated[int | None, opt.rare("--seeds", "Draws to average over: 3.", opt.HOW, "N")] = (
        None
    )
    train_limit: Annotated[
        int | None, opt.rare("--train-limit", "Draw so many images for probes.", opt.DATA, "N")
    ] = None
    test_limit: Annotated[
        int | None, opt.rare("--test-limit", "Draw so many test images.", opt.DATA, "N")
    ] = None


@command(
    "Research",
    "blockfit reproduce MODEL --images DATA --quick -o paper/",
    {"--data": "--images", "--model": ""},
)
def reproduce(
    out: Output,
    model: opt.Model,
    reading: Reading,
    loading: opt.Loading,
    study: Study,
    blocks: opt.BlocksPath = None,
    output: Output_ = Path("reproduction"),
    report: opt.ReportFile = None,
) -> None:
    """Run the paper's experiments: tables, pictures, an index."""
    from blockfit.commands.reporter import Reporter
    from blockfit.evaluation.paper.study import INDEX, chosen, earlier

    page = Reporter(report)
    out.expect(outlook.of_titles([one.title for one in chosen(study.experiments)]))
    what = {**asdict(study), "samples": _numbers(study.samples), "transfer": study.transfer or ()}
    images, parts = what.pop("images"), (study.train, study.test)
    if (images is None) == (None in parts):
        raise BlockfitError("give --images, or both --train and --test")
    if images is not None and parts != (None, None):
        raise BlockfitError("give --images, or --train and --test, not both")
    earlier(output)  # refuses a folder that is taken before anything is loaded
    with out.working(), keeping(lambda: f"the experiments that were finished are in {output}"):
        out.say(f"loading {model}")
        out.note(f"device: {loading.place()}")
        result = blockfit.reproduce(
            loading.load(model),
            images,
            output,
            blocks=blocks,
            say=out.say,
            progress=out.count,
            note=out.note,
            warn=lambda line: out.warn([line]),
            reads=out.show_images,
            **what,
            **asdict(reading),
        )
        page.reproduced(out, output)
    for name, entry in result["experiments"].items():
        out.line(f"{name} ({entry['seconds']:.0f} s): {entry['finding']}")
    out.line(f"written to {output / INDEX}")
    page.tell(out)
    out.result({**result, "output": str(output)})


def _numbers(text: str | None) -> list[int] | None:
    """``50,500`` as numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise BlockfitError(f"cannot read --samples {text!r}; write numbers, such as 50,500")
    return [int(part) for part in parts]
