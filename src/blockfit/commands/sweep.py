"""``blockfit sweep``: the best plan for every size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import blockfit
from blockfit import processes
from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output, keeping
from blockfit.errors import BlockfitError

MeasureLatency = Annotated[
    int | None,
    opt.option("--measure-latency", "Time every plan, so many images per forward.", opt.HOW, "N"),
]


Points = Annotated[
    str | None,
    opt.option(
        "--points",
        help="Percent of the parameters.  [default: 95,90,84,78,70,62,55,50,45,40]",
        panel=opt.HOW,
        metavar="LIST",
    ),
]


def shares(text: str) -> list[float]:
    """``95,90,62``, ``95%,62%`` or ``0.95,0.62`` as parts.

    Raises:
        BlockfitError: where something is no part, or may mean two.
    """
    found = []
    for part in text.split(","):
        number, percent = part.strip().removesuffix("%"), "%" in part
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        # 0.62 is what --params reads as 62%; 1.5 may be a slip of either.
        share = value if 0 < value < 1 and not percent else value / 100
        if not 0 < share < 1 or (1 <= value < 2 and not percent):
            raise BlockfitError(
                f"cannot read --points {text!r}; write percentages, such as 95,78,62"
            )
        found.append(share)
    return found


@command("Start", "blockfit sweep MODEL --images PHOTOS -o sweep/")
def sweep(
    out: Output,
    model: opt.Model,
    output: opt.Folder,
    reading: opt.Reading,
    loading: opt.Loading,
    written: opt.Written,
    method: opt.Method,
    judging: opt.Judging,
    running: opt.Running,
    images: opt.MaybePictures = None,
    blocks: opt.BlocksPath = None,
    points: Points = None,
    measure_latency: MeasureLatency = None,
    report: opt.ReportFile = None,
) -> None:
    """Find the best plan for every size.

    A sweep that was stopped goes on where it was.
    """
    from blockfit.commands.reporter import Reporter
    from blockfit.reports.runs import suggestion
    from blockfit.search import summaries
    from blockfit.search.sweep import POINTS
    from blockfit.search.sweep_file import check_sweep_folder

    written.need_data(images, report)
    check_sweep_folder(output)
    page = Reporter(report)
    chosen = method.chosen()
    chosen.check_use("a sweep")
    how = judging.how()
    given: dict[str, Any] = {} if points is None else {"points": shares(points)}
    out.expect(outlook.of_sweep(chosen, len(given.get("points", POINTS))))
    with out.working(), keeping(lambda: _finished(output)):
        original, pictures = opt.opened(out, model, images, reading, loading, True, written)
        frontier = blockfit.sweep(
            original,
            pictures,
            output,
            recipe=chosen,
            blocks=blocks,
            seed=reading.seed,
            **given,
            **how,
            say=out.say,
            progress=out.count,
            resume=running.state(output),
            max_memory=running.max_memory,
            latency_images=measure_latency,
        )
        shown = pictures.apart(min(opt.LOOKED_AT, len(pictures) // 2), reading.seed)[1]
        page.swept(out, output, original, pictures, shown)
    before = frontier.data["original"]
    out.show([summaries.frontier(frontier.points, before)])
    if processes.is_first() and (line := suggestion(output)) is not None:
        out.line(f"next: {line}")
    page.tell(out)
    out.result({"original": before, "points": frontier.points, "output": str(output)})


def _finished(folder: Path) -> str:
    """What a stopped sweep has kept."""
    from blockfit.search.sweep import read_sweep

    try:
        count = len(read_sweep(folder).points)
    except BlockfitError:
        return "no plan was finished yet"
    plans = "1 plan is" if count == 1 else f"{count} plans are"
    return f"{plans} kept in {folder}, and the same command goes on from there"
