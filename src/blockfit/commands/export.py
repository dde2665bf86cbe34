"""The command ``export``: a model in a form that needs no blockfit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import typer

from blockfit import api
from blockfit.commands import options as opt
from blockfit.commands.output import Output, show_images
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.formats import folder as store
from blockfit.formats.exported_folder import ExportedFolder
from blockfit.formats.folder import Saved
from blockfit.formats.hub_folder import export_hub
from blockfit.formats.manifest import installed_versions
from blockfit.formats.onnx_file import OPSET, ExportedOnnx, export_onnx
from blockfit.formats.plain import export_plain
from blockfit.formats.program import Exported, export_program
from blockfit.formats.traced import Resolution
from blockfit.models.blocks import find_blocks
from blockfit.models.load import source_of
from blockfit.units import amount

FOLDERS = {"plain": export_plain, "hub": export_hub}
"""Forms that are folders, by the functions that write them."""


def export(
    context: typer.Context,
    model: opt.Small,
    output: opt.Target,
    plain: opt.PlainCheckpoint = False,
    onnx: opt.Onnx = False,
    pt2: opt.Pt2 = False,
    hub: opt.Hub = False,
    resolution: opt.ResolutionText = None,
    fixed_batch: opt.FixedBatch = None,
    opset: opt.Opset = None,
    compare_levels: opt.CompareLevels = False,
    images: opt.CheckPictures = None,
    limit: opt.Limit = None,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 32,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    workers: opt.Workers = 0,
    max_pixels: opt.MaxPixels = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write a model in a form that needs no blockfit, compared with it before it is kept."""
    started = time.perf_counter()
    out = Output(as_json, quiet)
    form = _form(plain=plain, onnx=onnx, pt2=pt2, hub=hub)
    traced = {"--resolution": resolution, "--fixed-batch": fixed_batch}
    if form in FOLDERS:
        opt.refuse(traced, f"has no use with --{form}: the folder takes what the model takes")
    if form != "onnx":
        only_onnx = {"--opset": opset, "--compare-levels": compare_levels}
        opt.refuse(only_onnx, "goes with --onnx only")
    shape = None if resolution is None else Resolution.parse(resolution)
    with out.working():
        out.say(f"loading {model}")
        saved = store.load_saved(model) if form in FOLDERS else _opened(model, opt.loading(context))
        pictures = None
        if images is not None:
            reading = {"seed": seed, "batch_size": batch_size, **opt.reading(context)}
            pictures = api.images(images, saved.model, limit=limit, **reading)
            show_images(out, pictures.description())
        out.say(f"writing {output} and comparing it with the model")
        how: dict[str, Any] = {"images": pictures, "overwrite": overwrite}
        if form in FOLDERS:
            done: Any = FOLDERS[form](saved, output, **how)
        elif form == "pt2":
            done = export_program(saved, output, resolution=shape, batch=fixed_batch, **how)
        else:
            done = export_onnx(
                saved,
                output,
                resolution=shape,
                batch=fixed_batch,
                opset=OPSET if opset is None else opset,
                compare_levels=compare_levels,
                **how,
            )
    _SHOW[form](out, done)
    seconds = round(time.perf_counter() - started, 3)
    out.result({"form": form, **done.to_json(), "seconds": seconds, "output": str(output)})


def _form(**chosen: bool) -> str:
    """The one form that was asked for."""
    given = [name for name, wanted in chosen.items() if wanted]
    if len(given) != 1:
        several = f"--{' and --'.join(given)} are two forms" if given else "no form was given"
        raise BlockfitError(
            f"{several}; say one: --plain (an ordinary checkpoint with fewer blocks), --onnx (an "
            "ONNX file), --pt2 (a torch.export program) or --hub (a folder with its own code)"
        )
    return given[0]


def _opened(name: str, options: dict[str, Any]) -> Saved:
    """A folder that blockfit saved; or an original model, of which nothing was removed."""
    if store.is_saved(name):
        return store.load_saved(name)
    model = api.load(name, **options)
    source = source_of(model)
    return Saved(model, find_blocks(model), Plan(), {}, source, installed_versions())


def _show_folder(out: Output, done: ExportedFolder) -> None:
    out.line(f"{done.library} checkpoint with {done.blocks} blocks in {done.folder}")
    out.line(f"compared with the model: {done.parity}")
    out.line(f"load it: {done.how_to_load}")
    out.line(f"publish it: blockfit push {done.folder} OWNER/NAME")


def _show_file(out: Output, done: Exported) -> None:
    out.line(f"{_described(done)}, in {done.path}")
    out.line(f"compared with the model: {done.parity}")
    out.line(f'run it: torch.export.load("{done.path}").module()(images)')


def _show_onnx(out: Output, done: ExportedOnnx) -> None:
    out.line(f"{_described(done)}, opset {done.opset}, in {done.path}")
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
