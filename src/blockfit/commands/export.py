"""``blockfit export``: a model in a form that needs no blockfit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import blockfit
from blockfit.commands import options as opt
from blockfit.commands.command import command
from blockfit.commands.output import Output
from blockfit.errors import BlockfitError
from blockfit.units import amount

if TYPE_CHECKING:
    from blockfit.formats.exported_folder import ExportedFolder
    from blockfit.formats.folder import Saved
    from blockfit.formats.onnx_file import ExportedOnnx
    from blockfit.formats.program import Exported

PlainCheckpoint = Annotated[
    bool, opt.option("--plain", "A stock checkpoint of the model's library.", opt.FORM)
]
Onnx = Annotated[bool, opt.option("--onnx", "An ONNX file.", opt.FORM)]
Pt2 = Annotated[bool, opt.option("--pt2", "A torch.export program (.pt2).", opt.FORM)]
Hub = Annotated[bool, opt.option("--hub", "A transformers folder with its own code.", opt.FORM)]
Target = Annotated[Path, opt.option("--output", "Folder or file to write.", opt.OUT, "PATH", "-o")]
ResolutionText = Annotated[
    str | None,
    opt.option(
        "--resolution", "224, 224x320 (height first) or dynamic; else the model's.", opt.HOW, "SIZE"
    ),
]
FixedBatch = Annotated[
    int | None,
    opt.option("--fixed-batch", "Take so many images only, not any number.", opt.HOW, "N"),
]
Opset = Annotated[
    int | None, opt.option("--opset", "Version of the ONNX operator set; 18.", opt.HOW, "N")
]
WeightDtype = Annotated[
    str | None, opt.option("--weights", "float16 or bfloat16; else the model's.", opt.HOW, "DTYPE")
]
CompareLevels = Annotated[
    bool, opt.option("--compare-levels", "Time onnxruntime's graph optimisation levels.", opt.HOW)
]
Pictures = Annotated[
    str | None,
    opt.option("--images", "To compare on; else two sample photographs.", opt.DATA, "DATA"),
]

FOLDERS = ("plain", "hub")
"""Forms that are folders; the others are files."""


@command("Deploy", "blockfit export small/ --onnx -o small.onnx")
def export(
    out: Output,
    model: opt.Small,
    output: Target,
    reading: opt.Reading,
    code: opt.Code,
    plain: PlainCheckpoint = False,
    onnx: Onnx = False,
    pt2: Pt2 = False,
    hub: Hub = False,
    resolution: ResolutionText = None,
    fixed_batch: FixedBatch = None,
    opset: Opset = None,
    compare_levels: CompareLevels = False,
    weights: WeightDtype = None,
    base_model: opt.BaseModel = None,
    license: opt.License = None,
    images: Pictures = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write a model in a form that needs no blockfit.

    It is compared with the model before it is kept.
    """
    form = _form(plain=plain, onnx=onnx, pt2=pt2, hub=hub)
    _check_output(form, output, overwrite)
    how = {
        **_of_card(form, base_model, license),
        **_of_tracing(form, resolution, fixed_batch),
        **_of_weights(form, weights),
        **_of_onnx(form, opset, compare_levels),
    }
    with out.working():
        out.say(f"loading {model}")
        saved = _saved(model, code, form)
        out.note("device: cpu")
        pictures = None
        if images is not None:
            pictures = reading.open(images, saved.model)
            out.show_images(pictures)
        out.say(f"writing {output} and comparing it with the model")
        done = _WRITE[form](saved, output, images=pictures, overwrite=overwrite, **how)
    _SHOW[form](out, done)
    out.result({"form": form, **done.to_json(), "output": str(output)})


_WRITE: dict[str, Callable[..., Any]] = {
    "plain": lambda *what, **how: blockfit.export_plain(*what, **how),
    "hub": lambda *what, **how: blockfit.export_hub(*what, **how),
    "pt2": lambda *what, **how: blockfit.export_program(*what, **how),
    "onnx": lambda *what, **how: blockfit.export_onnx(*what, **how),
}
"""Forms by the functions that write them, looked up when they are called: they import torch."""


def _of_card(form: str, base_model: str | None, license: str | None) -> dict[str, Any]:
    """What the model card of a folder is told; refused before a model is loaded, as all below."""
    from blockfit.formats.card import Origin

    if form in FOLDERS:
        Origin(base_model, license)
        return {"base_model": base_model, "license": license}
    told = {"--base-model": base_model, "--license": license}
    opt.refuse(told, "goes with --plain and --hub only: a file has no model card")
    return {}


def _of_tracing(form: str, resolution: str | None, batch: int | None) -> dict[str, Any]:
    """The shapes that a traced file takes."""
    from blockfit.formats.traced import Resolution

    if form in FOLDERS:
        traced = {"--resolution": resolution, "--fixed-batch": batch}
        opt.refuse(traced, f"has no use with --{form}: the folder takes what the model takes")
        return {}
    shape = None if resolution is None else Resolution.parse(resolution)
    return {"resolution": shape, "batch": batch}


def _of_weights(form: str, dtype: str | None) -> dict[str, Any]:
    """The dtype of the weights, where it is not the model's."""
    from blockfit.formats.onnx_file import onnx_dtype

    if form not in ("plain", "onnx"):
        opt.refuse({"--weights": dtype}, "goes with --plain and --onnx only")
        return {}
    if form == "onnx":
        onnx_dtype(dtype)
    return {"dtype": dtype}


def _of_onnx(form: str, opset: int | None, compare_levels: bool) -> dict[str, Any]:
    """What only ONNX files have."""
    from blockfit.formats.onnx_file import OPSET

    if form != "onnx":
        opt.refuse({"--opset": opset, "--compare-levels": compare_levels}, "goes with --onnx only")
        return {}
    return {"opset": OPSET if opset is None else opset, "compare_levels": compare_levels}


def _check_output(form: str, output: Path, overwrite: bool) -> None:
    """Refuse now what the form's writer would refuse once the model is loaded."""
    from blockfit.files import check_file, check_target
    from blockfit.formats import exported_folder, onnx_file, program

    if form in FOLDERS:
        check_target(output, exported_folder.FORM, overwrite)
    else:
        check_file(output, (onnx_file if form == "onnx" else program).FORM, overwrite)


def _form(**chosen: bool) -> str:
    """The one form that was asked for."""
    given = [name for name, wanted in chosen.items() if wanted]
    if len(given) != 1:
        several = f"--{' and --'.join(given)} are two forms" if given else "no form was given"
        raise BlockfitError(
            f"{several}; say one: --plain (an ordinary checkpoint), --onnx (an "
            "ONNX file), --pt2 (a torch.export program) or --hub (a folder with its own code)"
        )
    return given[0]


def _saved(name: str, code: opt.Code, form: str) -> Saved:
    """A folder that blockfit saved; for files also an original, of which nothing was removed."""
    from blockfit.api import as_saved
    from blockfit.formats.folder import is_saved, load_saved

    if form in FOLDERS or is_saved(name):
        return load_saved(name)
    return as_saved(code.load(name))


def _show_folder(out: Output, done: ExportedFolder) -> None:
    out.line(f"{done.library} checkpoint with {done.blocks} blocks in {done.folder}")
    out.line(f"compared with the model: {done.parity}")
    out.line("load it: " + done.how_to_load.replace("\n", "\n         "))
    out.line(f"publish it: blockfit push {done.folder} OWNER/NAME")


def _show_file(out: Output, done: Exported) -> None:
    out.line(f"{_described(done)}, in {done.path}")
    out.line(f"compared with the model: {done.parity}")
    out.line(f'run it: torch.export.load("{done.path}").module()(images)')


def _show_onnx(out: Output, done: ExportedOnnx) -> None:
    out.line(f"{_described(done)}, opset {done.opset}, {done.dtype}, in {done.path}")
    out.line(f"compared with the model: {done.parity}")
    rows = []
    for level in done.levels:
        parity = level.parity
        rows.append(
            (
                level.name
                if level.name in ("pytorch", "openvino")
                else f"onnxruntime {level.name}",
                f"{level.latency_ms:.2f} ± {level.spread_ms / 2:.2f}",
                "–" if parity is None else f"{parity.max_abs_error:.1e}",
                "–" if parity is None or parity.agreement is None else f"{parity.agreement:.2%}",
            )
        )
    if rows:
        header = ("", "latency, ms", "largest difference", "same top-1")
        out.table(header, rows, "One image at a time, by graph optimisation level")
    out.line(
        f'run it: onnxruntime.InferenceSession("{done.path}").run(None, {{"{done.input}": images}})'
    )


_SHOW: dict[str, Callable[[Output, Any], None]] = {
    "plain": _show_folder,
    "hub": _show_folder,
    "pt2": _show_file,
    "onnx": _show_onnx,
}


def _described(done: Exported) -> str:
    size = "any size" if done.size is None else f"{done.size[0]} × {done.size[1]} pixels"
    batch = "any number of" if done.batch is None else f"{done.batch}"
    return f"{done.blocks} blocks, {amount(done.size_bytes, 'B')}, for {batch} images of {size}"
