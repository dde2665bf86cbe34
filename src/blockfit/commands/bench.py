"""``blockfit bench``: the original against compressed models, in turn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from blockfit import api
from blockfit.commands import options as opt
from blockfit.commands.output import Output
from blockfit.evaluation.bench import bench as bench_models
from blockfit.evaluation.engines import DTYPES, ENGINES
from blockfit.evaluation.speed import BATCH_SIZES, Settings
from blockfit.files import check_file, new_file
from blockfit.formats import folder as store
from blockfit.models.blocks import Blocks
from blockfit.models.cost import ROUNDS
from blockfit.reports.bench_page import (
    COLUMNS,
    cells,
    cost_cells,
    cost_columns,
    draw,
    how_measured,
    markdown,
    remark_lines,
)

Smalls = Annotated[
    list[str], typer.Argument(metavar="SMALL...", help="Folders that compress wrote, or models.")
]
Original = Annotated[str, opt.option("--against", help="The original model.", panel=opt.DATA)]
BatchSizes = Annotated[
    list[int] | None,
    opt.option(
        "--batch-size",
        help=f"Images per pass. Repeatable; {' and '.join(map(str, BATCH_SIZES))} by default.",
        panel=opt.HOW,
    ),
]
Engines = Annotated[
    list[str] | None,
    opt.option("--engine", help=f"{', '.join(ENGINES)}. Repeatable.", panel=opt.HOW),
]
Dtypes = Annotated[
    list[str] | None,
    opt.option("--dtype", help=f"{', '.join(DTYPES)}. Repeatable.", panel=opt.HOW),
]
Threads = Annotated[
    int | None, opt.option("--threads", help="On the CPU; torch's own by default.", panel=opt.HOW)
]
Rounds = Annotated[int, opt.option("--rounds", help="Timed passes of each model.", panel=opt.HOW)]
MarkdownFile = Annotated[
    Path | None, opt.option("--markdown", help="Write the tables to this file.", panel=opt.OUT)
]
PictureFile = Annotated[
    Path | None, opt.option("--picture", help="Draw the speed-ups as a PNG.", panel=opt.OUT)
]


def bench(
    context: typer.Context,
    smalls: Smalls,
    against: Original,
    batch_size: BatchSizes = None,
    engine: Engines = None,
    dtype: Dtypes = None,
    device: opt.Device = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    threads: Threads = None,
    rounds: Rounds = ROUNDS,
    markdown_file: MarkdownFile = None,
    picture: PictureFile = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Time compressed models and their original in turn: is the promised speed-up there?"""
    started = time.perf_counter()
    out = Output(as_json, quiet)
    for file, suffix in ((markdown_file, ".md"), (picture, ".png")):
        if file is not None:
            check_file(file, suffix, overwrite)
    settings = Settings(
        batch_sizes=batch_size or BATCH_SIZES,
        engines=engine or ENGINES[:1],
        dtypes=dtype or DTYPES[:1],
        device=opt.device(device) or "cpu",
        threads=torch.get_num_threads() if threads is None else threads,
        rounds=rounds,
    )
    with out.working():
        models, blocks = _opened(out, smalls, opt.loading(context))
        out.say(f"loading {against}")
        original = api.load(against, **opt.loading(context))
        result = bench_models(original, models, settings, blocks=blocks, say=out.say)
    if markdown_file is not None:
        with new_file(markdown_file) as partial:
            partial.write_text(markdown(result), encoding="utf-8")
    if picture is not None:
        with new_file(picture) as partial:
            draw(result, partial)
    out.line(how_measured(result))
    out.table(COLUMNS, [cells(row) for row in result.rows])
    out.table(cost_columns(result), cost_cells(result))
    for line in (*remark_lines(result), *result.skipped):
        out.line(line)
    out.result({**result.to_json(), "seconds": round(time.perf_counter() - started, 3)})


def _opened(
    out: Output, names: list[str], loading: dict[str, Any]
) -> tuple[dict[str, nn.Module], dict[str, Blocks]]:
    short = [Path(name).name for name in names]
    shown = short if len(set(short)) == len(names) else names
    models: dict[str, nn.Module] = {}
    blocks = {}
    for name, key in zip(names, shown, strict=True):
        out.say(f"loading {name}")
        if store.is_saved(name):
            saved = store.load_saved(name)
            models[key], blocks[key] = saved.model, saved.blocks
        else:
            models[key] = api.load(name, **loading)
    return models, blocks
