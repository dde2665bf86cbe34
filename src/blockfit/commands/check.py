"""``blockfit check``: does a model hold in half precision?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import blockfit
from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output
from blockfit.errors import BlockfitError
from blockfit.units import number, percent

if TYPE_CHECKING:
    from blockfit.evaluation.precision import Precision

Dtypes = Annotated[
    list[str] | None,
    opt.option("--dtype", "bfloat16, float16; both by default. Repeatable.", opt.HOW, "NAME"),
]


@command("Look", "blockfit check small/ --images PHOTOS")
def check(
    out: Output,
    small: opt.Small,
    images: opt.Pictures,
    reading: opt.Reading,
    loading: opt.Loading,
    dtype: Dtypes = None,
    blocks: opt.BlocksPath = None,
) -> None:
    """Compare a model in half precision with itself in float32."""
    from blockfit.evaluation.precision import HALVES, check_precision
    from blockfit.search.setting import CALIBRATION_IMAGES

    for name in dtype or ():
        if name not in HALVES:
            raise BlockfitError(f"unknown dtype {name!r}; choose {' or '.join(HALVES)}")
    out.expect(outlook.of_pass("checking", len(dict.fromkeys(dtype or HALVES))))
    with out.working():
        out.say(f"loading {small}")
        model, where = loading.load_small(small)
        given = reading.open(images, model)
        pictures = given.draw(CALIBRATION_IMAGES, reading.seed)  # rounding needs no more
        out.show_images(pictures, loading.place(), pictures is not given)
        if where is None or blocks is not None:
            where = blockfit.find_blocks(model, next(iter(pictures), None), blocks)
        found = []
        for name in dict.fromkeys(dtype or HALVES):
            out.say(f"checking {name}")
            found.append(check_precision(model, where, pictures, name, out.count))
    _show(out, found)
    out.result({"checks": [one.to_json() for one in found]})


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
