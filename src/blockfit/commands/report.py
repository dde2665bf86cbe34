"""``blockfit report``: runs explained on one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from blockfit.commands import options as opt
from blockfit.commands.command import command
from blockfit.commands.output import Output
from blockfit.errors import BlockfitError

Runs = Annotated[
    list[str],
    typer.Argument(
        help="Folders of compress, sweep, analyze, reproduce; files of evaluate --json."
    ),
]
Page = Annotated[Path, opt.option("--output", "File to write.", opt.OUT, "FILE", "-o")]
Against = Annotated[
    str | None,
    opt.option("--against", "The original, to show images side by side.", opt.DATA, "MODEL"),
]
Pictures = Annotated[
    str | None, opt.option("--images", "What both models are shown.", opt.DATA, "DATA")
]
Remove = Annotated[
    int | None, opt.option("--remove", "Which plan of a sweep: so many blocks less.", opt.DATA, "N")
]
Files = Annotated[
    Path | None,
    opt.option("--pictures", "Folder for every plot as PNG and SVG.", opt.OUT, "FOLDER"),
]


@dataclass(frozen=True)
class Reading(opt.Reading):
    """Few images in small batches: each is looked at."""

    limit: opt.Limit = opt.LOOKED_AT
    batch_size: opt.BatchSize = 8


@command("Look", "blockfit report sweep/ small/ -o report.html")
def report(
    out: Output,
    runs: Runs,
    reading: Reading,
    loading: opt.Loading,
    output: Page = Path("report.html"),
    against: Against = None,
    images: Pictures = None,
    remove: Remove = None,
    pictures: Files = None,
) -> None:
    """Explain runs on one HTML page that needs no network."""
    from blockfit.commands.reporter import beside, small_model
    from blockfit.files import check_kept, resolved
    from blockfit.reports.page import check_report, write_pictures, write_report
    from blockfit.reports.runs import read_runs

    check_report(output)
    if pictures is not None:
        check_kept(pictures)
    if (against is None) != (images is None):
        raise BlockfitError(
            "--against and --images go together: the original and the small model are shown the "
            "same images, such as --against MODEL --images DATA"
        )
    content = read_runs(runs)
    with out.working():
        if against is not None and images is not None:
            original, shown = opt.opened(out, against, images, reading, loading)
            small, blocks = small_model(runs, content, remove, original, loading.place())
            content = beside(out, content, original, small, blocks, shown)
        elif remove is not None:
            raise BlockfitError("--remove has no use without --against and --images; add them")
        out.say("drawing the report")
        write_report(content, output)
        files = [] if pictures is None else write_pictures(content, pictures)
    told = "" if pictures is None else f"; {len(files)} pictures in {pictures}"
    out.line(f"report in {output}, open it in a browser{told}")
    out.result(
        {
            "output": str(output),
            "bytes": resolved(output).stat().st_size,
            "model": content.model,
            "pictures": [str(path) for path in files],
        }
    )
