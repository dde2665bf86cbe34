"""The ``blockfit`` command: parse, call, print; nothing else."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from blockfit import __version__, api
from blockfit import processes as ranks
from blockfit.checkpoint import forget, place_beside
from blockfit.commands import options as opt
from blockfit.commands.bench import bench
from blockfit.commands.check import check
from blockfit.commands.common import analyze, evaluate, opened
from blockfit.commands.doctor import doctor
from blockfit.commands.export import export
from blockfit.commands.output import (
    Output,
    guarded,
    keeping,
    show_compression,
    show_evaluation,
    show_frontier,
    stop_logging,
)
from blockfit.commands.push import push
from blockfit.commands.quantize import quantize
from blockfit.commands.report import report as report_command
from blockfit.commands.reporter import Reporter
from blockfit.commands.reproduce import reproduce
from blockfit.errors import BlockfitError
from blockfit.evaluation.evaluate import evaluate as evaluate_model
from blockfit.formats import folder as store
from blockfit.search.budget import Budget
from blockfit.search.recipes import recipe_for
from blockfit.search.run import Result
from blockfit.search.session import HOLD_OUT
from blockfit.search.sweep import from_sweep, read_sweep
from blockfit.search.sweep import sweep as sweep_model

QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
"""Keeps other libraries' bars and warnings off the screen; what the user has set stays."""

QUIET_LOGGERS = ("torch.utils._pytree", "torch.utils.cpp_extension")
"""Warn of what no user of this command can change, when torchao or a compiler is loaded."""

DEMO_IMAGES = 512
"""Calibration images of the demo."""

app = typer.Typer(
    name="blockfit",
    help="Make a pretrained vision transformer smaller and faster without training it.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockfit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make a pretrained vision transformer smaller and faster without training it."""


@app.command()
def compress(
    context: typer.Context,
    output: opt.Folder,
    model: opt.MaybeModel = None,
    images: opt.MaybePictures = None,
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
    span: opt.Spans = None,
    remove: opt.Remove = None,
    params: opt.Params = None,
    flops: opt.Flops = None,
    latency: opt.Latency = None,
    max_kl: opt.MaxKl = None,
    max_drop: opt.MaxDrop = None,
    sweep_folder: opt.FromSweep = None,
    recipe: opt.RecipeName = None,
    plain: opt.Plain = False,
    map: opt.Map = None,
    rank: opt.Rank = None,
    per_token_type: opt.PerTokenType = False,
    ridge: opt.Ridge = None,
    prefix_weight: opt.PrefixWeight = None,
    repair: opt.Repair = None,
    repair_ridge: opt.RepairRidge = None,
    select: opt.Select = None,
    contiguous: opt.Contiguous = False,
    protect: opt.Protect = None,
    hold_out: opt.HoldOut = None,
    report: opt.ReportFile = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    max_memory: opt.MaxMemory = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Replace redundant blocks by closed-form maps and save the small model."""
    out = Output(as_json, quiet)
    store.check_folder(output, overwrite)
    page = Reporter(report)
    budget = Budget.of(
        remove=remove, params=params, flops=flops, latency=latency, max_kl=max_kl, max_drop=max_drop
    )
    how = opt.how(context)
    if sweep_folder is not None:
        unused = {
            "--images": images, "--limit": limit, "--span": span, "--blocks": blocks,
            "--recipe": recipe, "--plain": plain, "--select": select, "--contiguous": contiguous,
            "--protect": protect, "--hold-out": hold_out, "--resume": resume,
            "--max-memory": max_memory,
            **{f"--{name.replace('_', '-')}": value for name, value in how.items()},
        }  # fmt: skip
        opt.refuse(unused, "cannot be used with --from: the sweep has settled it")
        if budget is None:
            raise BlockfitError(
                "say how small: --from needs a budget, such as --remove 3 or --params 62%"
            )
        with out.working():
            out.say("making the sweep's model")
            original = (
                None
                if model is None
                else api.load(model, device=opt.device(device), **opt.loading(context))
            )
            result = from_sweep(sweep_folder, budget, original)
            api.save(result, output, overwrite=overwrite)
            page.compressed(out, result, output, sweep=sweep_folder)
        _compressed(out, result, model or result.source.name, output)
        page.tell(out)
        return
    if model is None or images is None:
        raise BlockfitError(
            "give a model and --images (or --from a sweep): "
            "blockfit compress MODEL --images DATA --remove 3 -o OUTPUT"
        )
    if span:
        opt.refuse(
            {"--select": select, "--contiguous": contiguous},
            "has no use with --span: the spans are chosen already",
        )
    chosen = opt.recipe(recipe, plain, select, contiguous)
    protected = opt.block_numbers(protect)
    state = place_beside(output) if resume else None
    with out.working(), keeping(lambda: _unfinished(state)):
        more: dict[str, Any] = {"loading": opt.loading(context), **opt.reading(context)}
        original, pictures = opened(out, model, images, limit, seed, batch_size, device, **more)
        hold_out = HOLD_OUT if hold_out is None else hold_out
        result = api.compress(
            page.kept(original),
            pictures,
            spans=span or None,
            remove=remove,
            params=params,
            flops=flops,
            latency=latency,
            max_kl=max_kl,
            max_drop=max_drop,
            recipe=chosen,
            **how,
            protect=protected,
            blocks=blocks,
            hold_out=hold_out,
            seed=seed,
            inplace=True,
            say=out.say,
            progress=out.count,
            resume=state,
            max_memory=max_memory,
        )
        if ranks.is_first():
            out.say(f"saving to {output}")
            api.save(result, output, overwrite=overwrite)
        held_out = pictures.split(hold_out, seed)[1]
        page.compressed(out, result, output, original, pictures, held_out)
        if state is not None:
            forget(state)
    _compressed(out, result, model, output)
    page.tell(out)


app.command()(evaluate)
app.command()(analyze)
app.command()(export)
app.command()(push)
app.command()(report_command)
app.command()(reproduce)
app.command()(bench)
app.command()(quantize)
app.command()(check)
app.command()(doctor)


@app.command()
def sweep(
    context: typer.Context,
    model: opt.Model,
    images: opt.Pictures,
    output: opt.Folder,
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
    recipe: opt.RecipeName = None,
    plain: opt.Plain = False,
    map: opt.Map = None,
    rank: opt.Rank = None,
    per_token_type: opt.PerTokenType = False,
    ridge: opt.Ridge = None,
    prefix_weight: opt.PrefixWeight = None,
    repair: opt.Repair = None,
    repair_ridge: opt.RepairRidge = None,
    select: opt.Select = None,
    contiguous: opt.Contiguous = False,
    protect: opt.Protect = None,
    hold_out: opt.HoldOut = None,
    measure_latency: opt.MeasureLatency = None,
    report: opt.ReportFile = None,
    resume: opt.Resume = False,
    max_memory: opt.MaxMemory = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Find the best plan for every size; a sweep that was stopped goes on where it was."""
    started = time.perf_counter()
    out = Output(as_json, quiet)
    page = Reporter(report)
    chosen = recipe_for(opt.recipe(recipe, plain, select, contiguous), **opt.how(context))
    protected = opt.block_numbers(protect)
    with out.working(), keeping(lambda: _finished(output)):
        more: dict[str, Any] = {"loading": opt.loading(context), **opt.reading(context)}
        original, pictures = opened(out, model, images, limit, seed, batch_size, device, **more)
        hold_out = HOLD_OUT if hold_out is None else hold_out
        frontier = sweep_model(
            original,
            pictures,
            output,
            recipe=chosen,
            protect=protected,
            blocks=blocks,
            hold_out=hold_out,
            seed=seed,
            say=out.say,
            progress=out.count,
            resume=place_beside(output) if resume else None,
            max_memory=max_memory,
            latency_images=measure_latency,
        )
        page.swept(out, output, original, pictures, pictures.split(hold_out, seed)[1])
    before = frontier.data["original"]
    show_frontier(out, frontier.points, before)
    out.line(f"next: blockfit compress --from {shlex.quote(str(output))} --params 62% -o small/")
    page.tell(out)
    out.result(
        {
            "original": before,
            "points": frontier.points,
            "seconds": round(time.perf_counter() - started, 3),
            "output": str(output),
        }
    )


@app.command()
def demo(
    remove: Annotated[int, opt.option("--remove", help="This many blocks.", panel=opt.REMOVE)] = 4,
    output: opt.MaybeFolder = None,
    seed: opt.Seed = 0,
    report: opt.ReportFile = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Compress the model that is shipped with blockfit, and show what it was worth."""
    out = Output(as_json, quiet)
    page = Reporter(report)
    if output is not None:
        store.check_folder(output, overwrite)
    with out.working():
        original, pictures = opened(out, "demo", "digits", DEMO_IMAGES, seed, 64, None)
        result = api.compress(
            original, pictures, remove=remove, seed=seed, say=out.say, progress=out.count
        )
        if output is not None:
            api.save(result, output, overwrite=overwrite)
        out.say("evaluating on the test digits")
        test = api.images("digits:test", original, batch_size=64)
        worth = evaluate_model(
            result.model, test, against=original, blocks=result.blocks, progress=out.count
        ).to_json()
        page.compressed(out, result, output, original, pictures, test, evaluation=worth)
    show_compression(out, result.report, result.blocks.depth)
    show_evaluation(out, worth)
    if output is not None:
        out.line(f"saved to {output}")
    page.tell(out)
    out.result({"compress": _compression(result, output), "evaluate": worth})


def _unfinished(state: Path | None) -> str:
    """What a stopped compression has kept: its state, where ``--resume`` was given."""
    if state is None or not state.exists():
        return "nothing unfinished was saved"
    return f"what is done is kept in {state}, and the same command goes on from there"


def _finished(folder: Path) -> str:
    """What a stopped sweep has kept."""
    try:
        count = len(read_sweep(folder).points)
    except BlockfitError:
        return "no plan was finished yet"
    plans = "1 plan is" if count == 1 else f"{count} plans are"
    return f"{plans} kept in {folder}, and the same command goes on from there"


def _compression(result: Result, output: Path | None) -> dict[str, Any]:
    return {
        "plan": result.plan.to_json(),
        **result.report,
        "output": None if output is None else str(output),
    }


def _compressed(out: Output, result: Result, model: str, output: Path) -> None:
    show_compression(out, result.report, result.blocks.depth)
    out.line(f"saved to {output} in {result.report['seconds']:.1f} s")
    words = ["blockfit", "evaluate", str(output), "--against", model, "--data", "TEST_IMAGES"]
    out.line(f"next: {shlex.join(words)}")
    out.result(_compression(result, output))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; see ``console.guarded``."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    command = list(arguments) or ["--help"]

    def joined() -> int | None:
        with ranks.joined():
            return app(command, prog_name="blockfit", standalone_mode=False)

    try:
        return guarded(joined, "--debug" in command)
    finally:
        stop_logging()


def main() -> None:
    """The entry point of ``blockfit`` and ``python -m blockfit``."""
    sys.exit(run(sys.argv[1:]))
