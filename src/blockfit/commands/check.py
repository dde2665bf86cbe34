"""``blockfit check``: does a model hold in half precision?"""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer

from blockfit import api
from blockfit.commands import options as opt
from blockfit.commands.output import Output, show_images
from blockfit.evaluation.precision import HALVES, Precision, check_precision
from blockfit.formats import folder as store
from blockfit.models.blocks import find_blocks
from blockfit.units import number, percent

Dtypes = Annotated[
    list[str] | None,
    opt.option("--dtype", help=f"{', '.join(HALVES)}; both by default. Repeatable.", panel=opt.HOW),
]


def check(
    context: typer.Context,
    small: opt.Small,
    images: opt.Pictures,
    dtype: Dtypes = None,
    limit: opt.Limit = None,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 32,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    workers: opt.Workers = 0,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    blocks: opt.BlocksPath = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Compare a model in half precision with itself in float32, block by block."""
    started = time.perf_counter()
    out = Output(as_json, quiet)
    with out.working():
        out.say(f"loading {small}")
        where = None
        if store.is_saved(small):
            saved = store.load_saved(small, device=opt.device(device))
            model, where = saved.model, saved.blocks
        else:
            model = api.load(small, device=opt.device(device), **opt.loading(context))
        how = {"seed": seed, "batch_size": batch_size, **opt.reading(context)}
        pictures = api.images(images, model, limit=limit, **how)
        show_images(out, pictures.description())
        if where is None or blocks is not None:
            where = find_blocks(model, next(iter(pictures), None), blocks)
        found = []
        for name in dict.fromkeys(dtype or HALVES):
            out.say(f"checking {name}")
            found.append(check_precision(model, where, pictures, name, out.count))
    _show(out, found)
    out.result(
        {
            "checks": [one.to_json() for one in found],
            "seconds": round(time.perf_counter() - started, 3),
        }
    )


def _show(out: Output, found: list[Precision]) -> None:
    rows = [
        (
            f"h[{first.index}]",
            f"{first.largest:.4g}",
            *(_error(one.boundaries[first.index].error) for one in found),
        )
        for first in found[0].boundaries
    ]
    rows += [
        ("output", "", *(number(one.output_error, 5) for one in found)),
        ("top-1 agreement", "", *(percent(one.agreement) for one in found)),
    ]
    out.table(
        ("", "largest value", *(one.dtype for one in found)),
        rows,
        f"Hidden states in half precision, error relative to float32, {found[0].images} images",
    )
    out.warn(warning for one in found for warning in one.warnings)


def _error(value: float) -> str:
    return "not finite" if math.isnan(value) else f"{value:.5f}"
