"""The commands that take a model as it is: ``evaluate`` and ``analyze``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from torch import nn

from blockfit import api
from blockfit.checkpoint import Checkpoint, place_beside, settled
from blockfit.commands import options as opt
from blockfit.commands.output import Output, show_analysis, show_evaluation, show_images
from blockfit.commands.protocols import Wanted
from blockfit.commands.reporter import Reporter
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.evaluation.analysis import analyze as analyze_model
from blockfit.evaluation.analysis import check_folder
from blockfit.evaluation.evaluate import evaluate as evaluate_model
from blockfit.formats import folder as store
from blockfit.models.blocks import find_blocks
from blockfit.models.load import source_of
from blockfit.models.tensors import fingerprint


def opened(
    out: Output,
    model: str,
    images: str,
    limit: int | None,
    seed: int,
    batch_size: int,
    device: str | None,
    loading: dict[str, Any] | None = None,
    **reading: Any,
) -> tuple[nn.Module, Images]:
    """A model and images for it, as the command line names them; both are told of."""
    out.say(f"loading {model}")
    loaded = api.load(model, device=opt.device(device), **(loading or {}))
    pictures = api.images(images, loaded, limit=limit, seed=seed, batch_size=batch_size, **reading)
    show_images(out, pictures.description())
    return loaded, pictures


def evaluate(
    context: typer.Context,
    small: opt.Small,
    data: opt.TestData,
    against: opt.Against = None,
    protocol: opt.Protocol = None,
    train: opt.Train = None,
    train_limit: opt.TrainLimit = None,
    classes: opt.Classes = None,
    prompt: opt.Prompts = None,
    masks: opt.Masks = None,
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
    resume: opt.Resume = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure a model's accuracy, size and speed, and its fidelity to the original."""
    out = Output(as_json, quiet)
    wanted = Wanted(tuple(dict.fromkeys(protocol or ())), train, classes, prompt, masks)
    wanted.check()
    with out.working():
        out.say(f"loading {small}")
        where = None
        if store.is_saved(small):
            saved = store.load_saved(small, device=opt.device(device))
            compressed, where = saved.model, saved.blocks
        else:
            compressed = api.load(small, device=opt.device(device), **opt.loading(context))
        original = None
        if against is not None:
            original = api.load(against, device=opt.device(device), **opt.loading(context))
        # The small model's own preprocessing; the original's where it has none.
        own = source_of(compressed).preprocessing is not None or original is None
        prepared = compressed if own else original
        how = {"seed": seed, "batch_size": batch_size, **opt.reading(context)}
        pictures = api.images(data, prepared, limit=limit, **how)
        show_images(out, pictures.description())
        if blocks is not None:
            where = find_blocks(compressed, next(iter(pictures), None), blocks)
        out.say("evaluating")
        models = {"original": original, "compressed": compressed}
        checkpoint = _checkpoint(small, models, pictures) if resume else None
        worth = evaluate_model(
            compressed,
            pictures,
            against=original,
            blocks=where,
            progress=out.count,
            checkpoint=checkpoint,
        ).to_json()
        if wanted.protocols:
            learn = train and api.images(train, prepared, limit=train_limit, **how)
            worth["protocols"] = wanted.judge(out, models, where, learn or None, pictures, data)
        if checkpoint is not None:
            checkpoint.forget()
    show_evaluation(out, worth)
    out.result(worth)


def _checkpoint(name: str, models: Mapping[str, nn.Module | None], images: Images) -> Checkpoint:
    """Where the progress of an evaluation lies: beside the model, or here where it is no file."""
    path = Path(name)
    target = path if path.exists() else Path(name.replace("/", "_"))
    run = {
        "models": {k: None if m is None else fingerprint(m) for k, m in models.items()},
        "images": settled(images.description()),
        "batch_size": images.batch_size,
    }
    return Checkpoint(place_beside(target.with_name(f"{target.name}.evaluate")), run)


def analyze(
    context: typer.Context,
    model: opt.Model,
    images: opt.Pictures,
    output: opt.MaybeFolder = None,
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
    report: opt.ReportFile = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    max_memory: opt.MaxMemory = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Compare the hidden states of all blocks: MSE, cosine, angle, CKA and R²."""
    started = time.perf_counter()
    out = Output(as_json, quiet)
    page = Reporter(report)
    if output is not None:
        check_folder(output, overwrite)
    elif resume:
        raise BlockfitError("--resume saves beside the output; name one with -o")
    with out.working():
        original, pictures = opened(
            out,
            model,
            images,
            limit,
            seed,
            batch_size,
            device,
            opt.loading(context),
            **opt.reading(context),
        )
        result = analyze_model(
            original,
            pictures,
            output,
            blocks=blocks,
            seed=seed,
            overwrite=overwrite,
            say=out.say,
            progress=out.count,
            resume=place_beside(output) if resume and output is not None else None,
            max_memory=max_memory,
        )
        page.analysed(out, result.to_json(), output)
    show_analysis(out, result.tables, result.warnings)
    if output is not None:
        out.line(f"all pairs of states: {', '.join(str(output / name) for name in result.files)}")
    page.tell(out)
    out.result(
        {
            **result.to_json(),
            "seconds": round(time.perf_counter() - started, 3),
            "output": None if output is None else str(output),
        }
    )
