"""``blockfit quantize``: int8 weights on top of a compressed model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import blockfit
from blockfit.commands import options as opt
from blockfit.commands.command import command
from blockfit.commands.output import Output
from blockfit.errors import BlockfitError
from blockfit.units import amount, number, percent, share

if TYPE_CHECKING:
    from torch import nn

    from blockfit.data.images import Images
    from blockfit.evaluation.stages import Stage
    from blockfit.formats.folder import Saved

ORIGINAL, COMPRESSED = "original", "compressed"
COLUMNS = (
    "", "top-1", "change", "agreement", "output error", "file", "of fp32", "ms", "images/s",
)  # fmt: skip

Small = Annotated[str, typer.Argument(metavar="SMALL", help="A folder that compress wrote.")]
Int8 = Annotated[
    str, opt.option("--int8", "weight-only, dynamic, onnx-dynamic, onnx-static.", opt.HOW, "KIND")
]
Target = Annotated[
    Path, opt.option("--output", "Folder, or ONNX file, to write.", opt.OUT, "PATH", "-o")
]
Calibration = Annotated[
    str | None, opt.option("--images", "For onnx-static; else those of compress.", opt.DATA, "DATA")
]
CalibrationLimit = Annotated[
    int | None, opt.rare("--images-limit", "Draw so many of --images.", opt.DATA, "N")
]
TestData = Annotated[
    str | None, opt.option("--test", "Images to compare all stages on.", opt.DATA, "DATA")
]


@command("Deploy", "blockfit quantize small/ -o tiny/", {"--data": "--test"})
def quantize(
    out: Output,
    small: Small,
    output: Target,
    reading: opt.Reading,
    code: opt.Code,
    int8: Int8 = "weight-only",
    images: Calibration = None,
    images_limit: CalibrationLimit = None,
    against: opt.Against = None,
    test: TestData = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Bring the weights of a compressed model to int8."""
    import torch

    from blockfit.evaluation.stages import stages
    from blockfit.formats.folder import load_saved
    from blockfit.models.cost import parameters, size_bytes

    _check(int8, output, overwrite, images, against, test)
    with out.working():
        out.say(f"loading {small}")
        saved = load_saved(small)
        out.note("device: cpu")
        out.say(f"writing {output}")
        used = _calibration(saved, images, images_limit, reading) if "static" in int8 else None
        if used is not None:
            out.show_images(used)
        tiny, after = _written(saved, int8, output, used, overwrite)
        before = size_bytes(saved.model)
        found: list[Stage] = []
        if against is not None and test is not None:
            original = code.load(against)
            whole = 4 * parameters(original)
            models = {ORIGINAL: original, COMPRESSED: saved.model, f"+ int8 {int8}": tiny}
            sizes = dict(zip(models, (size_bytes(original), before, after), strict=True))
            pictures = reading.open(test, saved.model)
            out.show_images(pictures)
            out.say("comparing")
            found = stages(models, sizes, pictures, saved, progress=out.count)
    out.line(f"weights: {amount(before, 'B')} → {amount(after, 'B')}, in {output}")
    if found:
        _show(out, found, whole)
    out.result(
        {
            "int8": int8,
            "size_bytes_before": before,
            "size_bytes": after,
            "original_float32_bytes": whole if found else None,
            "stages": [stage.to_json() for stage in found],
            "threads": torch.get_num_threads(),
            "output": str(output),
        }
    )


def _check(
    int8: str,
    output: Path,
    overwrite: bool,
    images: str | None,
    against: str | None,
    test: str | None,
) -> None:
    """Refuse what does not go together, before anything is loaded."""
    from blockfit.files import check_file
    from blockfit.formats.folder import check_folder
    from blockfit.formats.onnx_file import FORM
    from blockfit.formats.quantize_onnx import ONNX_KINDS
    from blockfit.models.tensors import INT8_KINDS

    if int8 not in (known := (*INT8_KINDS, *ONNX_KINDS)):
        raise BlockfitError(f"unknown --int8 {int8!r}; choose one of {', '.join(known)}")
    if int8 in ONNX_KINDS:
        check_file(output, FORM, overwrite)
    else:
        check_folder(output, overwrite)
    if images is not None and int8 != "onnx-static":
        raise BlockfitError(f"--images has no use with {int8}, which needs no calibration")
    if (against is None) != (test is None):
        raise BlockfitError(
            "--against and --test go together: give the original and images to compare on"
        )


def _written(
    saved: Saved, int8: str, output: Path, used: Images | None, overwrite: bool
) -> tuple[nn.Module, int]:
    """The model as it was written, and its bytes."""
    from blockfit.evaluation.stages import quantize as quantize_model
    from blockfit.files import resolved
    from blockfit.formats.folder import save
    from blockfit.formats.onnx_file import Session
    from blockfit.formats.quantize_onnx import ONNX_KINDS, quantize_onnx
    from blockfit.models.cost import size_bytes

    if int8 in ONNX_KINDS:
        quantize_onnx(saved, output, int8, used, overwrite=overwrite)
        return Session(resolved(output)), resolved(output).stat().st_size
    tiny = quantize_model(saved, int8)
    save(
        output, tiny.model, tiny.blocks, tiny.plan,
        source=tiny.source, report=tiny.report, overwrite=overwrite,
    )  # fmt: skip
    loaded = blockfit.load(output)
    return loaded, size_bytes(loaded)


def _calibration(
    saved: Saved, images: str | None, limit: int | None, reading: opt.Reading
) -> Images:
    """The images that were named, or else those that the model was compressed on."""
    if images is not None:
        return reading.open(images, saved.model, limit=limit)
    told = saved.report.get("calibration", {})
    if not {"source", "used", "seed"} <= told.keys():
        raise BlockfitError("the folder does not say what it was calibrated on; give --images")
    return reading.open(told["source"], saved.model, limit=limit or told["used"], seed=told["seed"])


def _show(out: Output, found: Sequence[Stage], whole: int) -> None:
    """One row per stage; the change of top-1 is from the stage before."""
    changes = ["–"]
    for earlier, later in itertools.pairwise(found):
        if earlier.top1 is None or later.top1 is None:
            changes.append("–")
        else:
            changes.append(f"{100 * (later.top1 - earlier.top1):+.2f}")
    rows = [
        (
            stage.name,
            percent(stage.top1),
            change,
            percent(stage.agreement),
            number(stage.error),
            amount(stage.size_bytes, "B"),
            share(stage.size_bytes, whole),
            f"{stage.latency.median_ms:.1f} ± {stage.latency.spread_ms / 2:.1f}",
            number(stage.throughput.images_per_second, 1),
        )
        for stage, change in zip(found, changes, strict=True)
    ]
    out.table(COLUMNS, rows)
    last = found[-1]
    out.line(
        "change: points of top-1 from the stage before; of fp32: of the original's "
        f"{amount(whole, 'B')} in float32; ms: one image, images/s: batches of "
        f"{last.throughput.images}, in turn, with {last.throughput.threads} threads"
    )
