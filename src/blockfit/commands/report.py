"""``blockfit report``: runs explained on one HTML page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from blockfit.commands import options as opt
from blockfit.commands.common import opened
from blockfit.commands.output import Output
from blockfit.commands.reporter import LOOKED_AT, beside, small_model
from blockfit.errors import BlockfitError
from blockfit.reports.page import check_report, write_pictures, write_report
from blockfit.reports.runs import read_runs

Runs = Annotated[
    list[str],
    typer.Argument(
        help="Folders of compress, sweep, analyze, reproduce; files of evaluate --json."
    ),
]
Page = Annotated[Path, opt.option("--output", "-o", help="File to write.", panel=opt.OUT)]
Against = Annotated[
    str | None,
    opt.option("--against", help="The original, to show images side by side.", panel=opt.DATA),
]
Pictures = Annotated[
    str | None, opt.option("--images", help="What both models are shown.", panel=opt.DATA)
]
Remove = Annotated[
    int | None,
    opt.option("--remove", help="Whose images of a sweep: this many blocks.", panel=opt.DATA),
]
Limit = Annotated[int, opt.option("--limit", help="Draw this many images.", panel=opt.DATA)]
Files = Annotated[
    Path | None,
    opt.option("--pictures", help="Folder for every plot as PNG and SVG.", panel=opt.OUT),
]


def report(
    context: typer.Context,
    runs: Runs,
    output: Page = Path("report.html"),
    against: Against = None,
    images: Pictures = None,
    remove: Remove = None,
    limit: Limit = LOOKED_AT,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 8,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    workers: opt.Workers = 0,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    pictures: Files = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Explain runs on one page: a single HTML file that needs no network."""
    started = time.perf_counter()
    out = Output(as_json, quiet)
    check_report(output)
    if (against is None) != (images is None):
        raise BlockfitError(
            "--against and --images go together: the original and the small model are shown the "
            "same images, such as --against MODEL --images DATA"
        )
    content = read_runs(runs)
    with out.working():
        if against is not None and images is not None:
            original, shown = opened(
                out,
                against,
                images,
                limit,
                seed,
                batch_size,
                device,
                opt.loading(context),
                **opt.reading(context),
            )
            small, blocks = small_model(runs, content, remove, original, device)
            content = beside(out, content, original, small, blocks, shown)
        elif remove is not None:
            raise BlockfitError("--remove has no use without --against and --images; add them")
        out.say("drawing")
        write_report(content, output)
        files = [] if pictures is None else write_pictures(content, pictures)
    told = "" if pictures is None else f"; {len(files)} pictures in {pictures}"
    out.line(f"report in {output}, open it in a browser{told}")
    out.result(
        {
            "output": str(output),
            "bytes": output.expanduser().stat().st_size,
            "model": content.model,
            "pictures": [str(path) for path in files],
            "seconds": round(time.perf_counter() - started, 3),
        }
    )
