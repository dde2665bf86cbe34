"""The verbs: every command as a function. Each makes models and images of names and calls down."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from blockfit.arguments import checked, fitted
from blockfit.calibration import LOSSES, Held, by_hand
from blockfit.calibration import Calibration as Calibration
from blockfit.checkpoint import Checkpoint
from blockfit.data.images import Images, prepared_images
from blockfit.data.images import images as images
from blockfit.data.texts import check_two_towers, pairs
from blockfit.data.texts import texts as written_texts
from blockfit.errors import BlockfitError, tell
from blockfit.evaluation import bench as benchmark
from blockfit.evaluation import evaluate as evaluation
from blockfit.evaluation.analysis import analyze as analyze
from blockfit.evaluation.compare import Comparison, Entrant, preparing
from blockfit.evaluation.compare import compare as compare_entrants
from blockfit.evaluation.evaluate import Evaluation
from blockfit.evaluation.paper import setup, study
from blockfit.evaluation.speed import Bench, Settings
from blockfit.files import check_file, check_kept, check_target, expanded, resolved
from blockfit.fit.plan import Plan, Span
from blockfit.formats import exported_folder, hub_folder, onnx_file, plain, program
from blockfit.formats import folder as store
from blockfit.formats.card import Origin
from blockfit.formats.exported_folder import ExportedFolder
from blockfit.formats.folder import Saved
from blockfit.formats.onnx_file import ExportedOnnx
from blockfit.formats.pretrained import WRITERS
from blockfit.formats.program import Exported
from blockfit.models.blocks import Blocks
from blockfit.models.load import load_model, source_of
from blockfit.models.preprocessing import Given
from blockfit.models.stages import find_blocks
from blockfit.models.surgery import OwnWriter
from blockfit.models.wrappers import bare
from blockfit.progress import Progress, Say, Teller, silent, told
from blockfit.provenance import installed_versions
from blockfit.reports.page import check_report, write_report
from blockfit.reports.runs import read_runs
from blockfit.search import sweep as sweeps
from blockfit.search.budget import Budget
from blockfit.search.recipes import Recipe, recipe_for
from blockfit.search.run import Result as Result
from blockfit.search.setting import HOLD_OUT
from blockfit.search.sweep import sweep as sweep

OwnWriter.writers.update(WRITERS)


@checked
def load(name: str | Path, *, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A model by name, or a compressed model from a folder that ``save`` wrote.

    Args:
        name: a saved folder; a transformers folder or Hub id; ``timm/NAME``;
            ``torchvision/NAME``; ``open_clip/NAME.WEIGHTS``; ``demo``.
        model: the freshly built original, for folders saved from a user's own module class.
        options: ``device``, ``dtype``, and for models by name ``trust_remote_code``.

    Returns:
        The model in eval mode.

    Raises:
        BlockfitError: where there is no such model or the folder is damaged.
    """
    if store.is_saved(name):
        options.pop("trust_remote_code", None)  # there is no code in a saved folder
        if unknown := [key for key in options if key not in ("device", "dtype")]:
            raise BlockfitError(
                f"{name} is a folder saved by blockfit, for which there is device= and dtype= "
                f"alone; leave {unknown[0]}= out"
            )
        return store.load(name, model=model, **options)
    if model is not None:
        raise BlockfitError(f"{name} is no folder saved by blockfit; leave model= out")
    return load_model(str(name), **options)


@checked
def compress(
    model: nn.Module | str | Path,
    images: Any = None,
    *,
    texts: Any = None,
    spans: Iterable[Span | str | tuple[int, int]] | None = None,
    remove: int | None = None,
    params: float | str | None = None,
    flops: float | str | None = None,
    latency: float | str | None = None,
    max_kl: float | None = None,
    max_drop: float | None = None,
    recipe: str | Recipe = "default",
    map: str | None = None,
    rank: int | None = None,
    per_token_type: bool | None = None,
    ridge: float | str | None = None,
    prefix_weight: float | None = None,
    repair: str | None = None,
    repair_ridge: float | None = None,
    views: int | None = None,
    cuts: Iterable[str] | str | None = None,
    multiple_of: int | None = None,
    uniform: bool = False,
    protect: Iterable[int] = (),
    whole: Iterable[int] = (),
    blocks: str | None = None,
    plan: Plan | None = None,
    hold_out: float = HOLD_OUT,
    final: int | None = None,
    force_budget: bool = False,
    seed: int = 0,
    preprocessing: Given | None = None,
    inplace: bool = False,
    say: Say | None = None,
    progress: Progress | bool | None = None,
    resume: str | Path | None = None,
    max_memory: int | str | None = None,
) -> Result:
    """Make a model smaller without training it: narrower parts of blocks, maps for whole blocks.

    Give one budget, ``spans`` or a ``plan``. ``remove`` takes whole blocks only; every other
    budget may narrow MLPs, values and queries–keys as well (``cuts``). The images need no labels.

    Args:
        model: any module whose blocks map (batch, tokens, width) to the same shape, or a name.
        images: ``Images``, or whatever ``blockfit.images`` takes. 512 are drawn for the
            calibration; ``blockfit.images(…, limit=N)`` or ``limit="all"`` says otherwise.
        texts: ``blockfit.texts(…)``, or its source where the model comes with its tokenizer: for
            models of texts, and of images and texts. Of the latter, images alone make the image
            tower smaller, texts alone the text tower, and both make both smaller under one budget,
            by the similarities of images to texts.
        spans: what goes, by hand: ``["2:4", "9:11"]`` or ``[(2, 4), (9, 11)]``.
        remove: how many blocks go.
        params: the part of the parameters that may remain: ``0.62`` or ``"62%"``.
        flops: the same of the floating-point operations of one forward.
        latency: the same of the latency, measured on this machine.
        max_kl: largest KL divergence of the output, in nats; judged by the upper end of a
            one-sided 95% interval, on images that decide nothing else.
        max_drop: largest loss of top-1 in points, judged likewise, image by image against the
            original; needs labels.
        recipe: ``default``, ``paper``, ``plain``, a ``Recipe``, or one of the baselines
            ``identity``, ``corp``, ``vbp`` and ``magnitude``.
        map: kind of map, instead of the recipe's.
        rank: of ``low-rank`` maps.
        per_token_type: one map for prefix and another for patch tokens.
        ridge: λ of the maps, instead of the recipe's; ``"auto"`` chooses it for each map.
        prefix_weight: weight of a prefix token in every fit, where a patch token weighs 1.
        repair: ``none``, ``mlp`` or ``mlp+attention``, instead of the recipe's.
        repair_ridge: λ of the repairs, towards the original weights.
        views: how often each image that is fitted on, or effects are measured on, is shown: as it
            is, then as crops of it. By default more often the fewer they are: 8 times where there
            are 32 images, once where there are 512.
        cuts: what budgets other than ``remove`` may cut, of ``blocks``, ``mlp``, ``values`` and
            ``keys``; all by default.
        multiple_of: widths that MLPs keep are multiples of it; of 32 by default.
        uniform: what a stock config can say, so that ``export_plain`` can write it: one width for
            the MLPs of all blocks, and blocks that leave no module. The recipe ``plain`` is that.
        protect: blocks that must stay because something reads their output; their parts may be
            narrowed.
        whole: blocks that nothing may cut.
        blocks: dotted path of the list of blocks, where looking is not enough.
        plan: these cuts, such as another run's ``result.plan``.
        hold_out: part of the calibration images that chooses the plan and is not fitted on.
        final: images that are used for the final figures alone: up to 1,000 of those beyond the
            calibration images by default, a fifth of all where too few are; 0 for none.
        force_budget: judge ``max_kl`` and ``max_drop`` by what is measured, not by what is sure.
        seed: of every draw.
        preprocessing: as in ``blockfit.images``, where it is not the model's own or the model
            does not say; saved with the small model, but for functions.
        inplace: change ``model`` itself instead of a copy.
        say: called with one line on what is being done, which goes to the log ``blockfit`` (INFO)
            otherwise.
        progress: called with how many of how many (images, blocks) are done of what was said last;
            or whether there is a bar: by default in terminals and notebooks, unless the environment
            has ``BLOCKFIT_PROGRESS=0``.
        resume: a folder in which the run saves its progress from time to time; one that was
            stopped goes on from there when it is called again with the same arguments, to the
            same result. Delete it once the result is saved.
        max_memory: what moments and hidden states may take above the model, as ``"2GB"`` or in
            bytes; the result is the same.

    Returns:
        The small model with its plan and report.

    Raises:
        BlockfitError: for anything that cannot be done; ``model`` is then unchanged.
    """
    started = time.perf_counter()
    budget = Budget.of(
        remove=remove, params=params, flops=flops, latency=latency, max_kl=max_kl, max_drop=max_drop
    )
    asked: dict[str, Any] = {
        "recipe": recipe,
        "map": map,
        "rank": rank,
        "per_token_type": per_token_type,
        "cuts": cuts,
        "uniform": uniform,
        "ridge": ridge,
        "prefix_weight": prefix_weight,
        "repair": repair,
        "repair_ridge": repair_ridge,
        "views": views,
    }
    held = Held.of(
        protect=protect,
        whole=whole,
        multiple_of=multiple_of,
        hold_out=hold_out,
        seed=seed,
        max_memory=max_memory,
        resume=resume,
    )
    chosen = recipe_for(spans_given=spans is not None, **asked)
    plan = by_hand(spans, plan, budget, chosen, held)
    model, inplace = store.module_of(model), inplace or not isinstance(model, nn.Module)
    with Teller(say, progress) as teller:
        calibration = Calibration(
            model,
            given_data(images, texts, model, preprocessing, seed),
            chosen,
            asked,
            held,
            blocks=blocks,
            final=final,
            judging=budget is not None and budget.kind in LOSSES,
            teller=teller,
            budget=budget,
            force_budget=force_budget,
        )
        result = calibration.solved(chosen, plan, budget, force_budget, started, inplace)
    tell(result.report["warnings"], stacklevel=3)
    return result


@checked
def calibrate(
    model: nn.Module | str | Path,
    images: Any = None,
    *,
    texts: Any = None,
    recipe: str | Recipe = "default",
    views: int | None = None,
    cuts: Iterable[str] | str | None = None,
    multiple_of: int | None = None,
    protect: Iterable[int] = (),
    whole: Iterable[int] = (),
    blocks: str | None = None,
    hold_out: float = HOLD_OUT,
    final: int | None = None,
    judge: bool = False,
    seed: int = 0,
    preprocessing: Given | None = None,
    say: Say | None = None,
    progress: Progress | bool | None = None,
    max_memory: int | str | None = None,
) -> Calibration:
    """Run a model on calibration images once, to make it smaller for any number of budgets.

    ``calibration.compress(params="62%")`` gives what ``compress`` gives from the same images; the
    next budget takes only its search and its solution.

    Args:
        model: as in ``compress``; it is left as it is.
        images: as in ``compress``.
        texts: as in ``compress``.
        recipe: as in ``compress``; what ``calibration.compress`` does that names no other.
        views: as in ``compress``; for all calls of the calibration.
        cuts: as in ``compress``; likewise.
        multiple_of: as in ``compress``.
        protect: as in ``compress``.
        whole: as in ``compress``.
        blocks: as in ``compress``.
        hold_out: as in ``compress``.
        final: as in ``compress``.
        judge: set images apart that budgets of loss (``max_kl``, ``max_drop``) are judged by.
        seed: as in ``compress``.
        preprocessing: as in ``compress``.
        say: as in ``compress``; for all calls of the calibration.
        progress: as in ``compress``; likewise.
        max_memory: as in ``compress``.

    Raises:
        BlockfitError: no blocks, too few images, a model that is compressed already.
    """
    held = Held.of(
        protect=protect,
        whole=whole,
        multiple_of=multiple_of,
        hold_out=hold_out,
        seed=seed,
        max_memory=max_memory,
    )
    asked: dict[str, Any] = {"recipe": recipe, "cuts": cuts, "views": views}
    chosen = recipe_for(**asked)
    chosen.check_use("params=", protect=held.protect, whole=held.whole, multiple_of=multiple_of)
    module = _module(model)
    teller = Teller(say, progress)
    pictures = given_data(images, texts, module, preprocessing, seed)
    how: dict[str, Any] = {"blocks": blocks, "final": final, "judging": judge, "teller": teller}
    return Calibration(module, pictures, chosen, asked, held, **how).run()


@checked
def save(model: Result | Saved | nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a compressed model to a folder that ``load`` reads, whole or not at all.

    Args:
        model: what ``compress`` or ``from_sweep`` returned, or its model, or one that ``load``
            gave: trained since or not, with a new head or other labels.
        folder: new or empty.
        overwrite: replace what an earlier run wrote.

    Raises:
        BlockfitError: where nothing was taken out of the model, or the folder is taken or cannot be
            written.
    """
    saved = store.saved_of(bare(model)) if isinstance(model, nn.Module) else as_saved(model)
    store.save(
        folder,
        saved.model,
        saved.blocks,
        saved.plan,
        source=saved.source,
        report=saved.report,
        overwrite=overwrite,
    )


@checked
def from_sweep(
    folder: str | Path,
    budget: Budget | None = None,
    model: nn.Module | str | Path | None = None,
    *,
    remove: int | None = None,
    params: float | str | None = None,
    flops: float | str | None = None,
    latency: float | str | None = None,
    max_kl: float | None = None,
    max_drop: float | None = None,
    force_budget: bool = False,
    images: Any = None,
    final: int | None = None,
    preprocessing: Given | None = None,
    say: Say | None = None,
    progress: Progress | bool | None = None,
    max_memory: int | str | None = None,
) -> Result:
    """Make the model of a sweep's best plan for one budget, without images.

    With images, a plan for the budget itself is chosen by the curves and effects that the sweep
    measured, and solved and judged on the images: any size exactly, and of all budgets of
    ``compress``.

    Args:
        folder: that ``sweep`` wrote.
        budget: what has to be reached; or by its name one of the budgets of ``compress``.
        model: the original; loaded by the name that the sweep wrote down where ``None``.
        remove: as in ``compress``.
        params: as in ``compress``.
        flops: as in ``compress``.
        latency: as in ``compress``; of plans that the sweep has timed.
        max_kl: as in ``compress``.
        max_drop: as in ``compress``.
        force_budget: as in ``compress``.
        images: as in ``compress``; those of the sweep or others. Protected blocks, seed and all
            that the sweep has settled stay as they are.
        final: as in ``compress``, as are all that follow; with images alone.
        preprocessing: for models that do not say how their images are prepared.
        say: called with one line on what is being done.
        progress: of the bar.
        max_memory: of moments and hidden states.

    Raises:
        BlockfitError: no budget or two, no plan that meets it, another model than the sweep's.
    """
    wanted = Budget.one(
        budget,
        remove=remove,
        params=params,
        flops=flops,
        latency=latency,
        max_kl=max_kl,
        max_drop=max_drop,
    )
    options: dict[str, Any] = {
        "final": final,
        "preprocessing": preprocessing,
        "max_memory": max_memory,
    }
    if images is None:
        for name, value in {**options, "say": say, "progress": progress}.items():
            if value is not None:
                raise BlockfitError(f"{name}= has no use without images=")
        result = sweeps.from_sweep(folder, wanted, model, force_budget)
    else:
        with Teller(say, progress) as teller:
            frontier = sweeps.read_sweep(folder)
            result = _solved(frontier, wanted, model, images, force_budget, teller, **options)
    tell(result.report["warnings"], stacklevel=3)
    return result


def _solved(
    frontier: sweeps.Frontier,
    budget: Budget,
    model: nn.Module | str | Path | None,
    images: Any,
    force_budget: bool,
    teller: Teller,
    *,
    preprocessing: Given | None,
    **how: Any,
) -> Result:
    """The model of a plan for a budget, by what a sweep has measured."""
    started = time.perf_counter()
    original = frontier.original(model)
    pictures = prepared_images(images, original, preprocessing, frontier.content.run.seed)
    how |= {"teller": teller, "force_budget": force_budget}
    calibration = Calibration.of_sweep(frontier, original, pictures, budget, **how)
    inplace = not isinstance(model, nn.Module)
    result = calibration.solved(calibration.recipe, None, budget, force_budget, started, inplace)
    result.report["sweep"] = str(frontier.folder)
    return result


@checked
@told
def evaluate(
    compressed: Result | Saved | nn.Module | str | Path,
    data: Any = None,
    *,
    texts: Any = None,
    against: nn.Module | str | Path | None = None,
    blocks: Blocks | None = None,
    measure: bool = True,
    preprocessing: Given | None = None,
    progress: Progress | bool | None = None,
    checkpoint: Checkpoint | None = None,
) -> Evaluation:
    """Accuracy, size and speed of a model, and its fidelity to the original.

    Both get the same inputs, each on its own device and in its own dtype.

    Args:
        compressed: what ``compress`` returned, a module, or a name that ``load`` takes.
        data: ``Images``, or whatever ``blockfit.images`` takes; labels are used where there are
            any.
        texts: as in ``compress``: alone, the outputs for texts are compared; with ``data``, the
            embeddings of both towers, and the similarities of the images to the texts of a batch.
        against: the original or its name, for comparison.
        blocks: where both models' blocks are; known of a result and of a saved folder, else found.
        preprocessing: as in ``compress``.
        measure: time the models in turn and measure their memory, on the first batch.
        progress: called after every batch; or whether there is a bar, as in ``compress``.
        checkpoint: where the sums of the batches are saved from time to time, and gone on from.

    Raises:
        BlockfitError: no image, outputs that are not finite or differ in shape, labels that the
            head does not have, an original with other blocks.
    """
    assert callable(progress)  # whatever the caller gave
    small = as_saved(compressed) if _has_blocks(compressed) else None
    model = _module(compressed) if small is None else small.model
    where = small.blocks if blocks is None and small is not None else blocks
    original = None if against is None else _module(against)
    # The small model's own preprocessing; the original's where it has none.
    own = source_of(model).preprocessing is not None or original is None
    return evaluation.evaluate(
        model,
        given_data(data, texts, model if own or original is None else original, preprocessing, 0),
        against=original,
        blocks=where,
        measure=measure,
        progress=progress,
        checkpoint=checkpoint,
    )


@checked
@told
def compare(
    models: Mapping[str, Any] | Sequence[Any],
    data: Any,
    *,
    against: str | None = None,
    progress: Progress | bool | None = None,
) -> Comparison:
    """Any number of models side by side on the same images, with paired differences.

    Args:
        models: two or more results, modules or names, by the names to show; or a list of them,
            of which results and modules are called ``model 1``, ``model 2``.
        data: ``Images``, or whatever ``blockfit.images`` takes, which is then prepared for each
            model as it needs; labels are used where there are any.
        against: which of the models the differences are from; by default the largest.
        progress: called after every batch, with images done and in all, over all passes; or
            whether there is a bar, as in ``compress``.

    Returns:
        Size, accuracy and differences of each model, per class as well, each with its 95%
        interval, and the images on which they part.

    Raises:
        BlockfitError: fewer than two models, an unknown reference, no images, outputs that are not
            finite.
    """
    assert callable(progress)  # whatever the caller gave
    named = _by_name(models, "models")
    if len(named) < 2:
        raise BlockfitError("there is one model; give two or more to compare")
    saved = {name: as_saved(one) for name, one in named.items() if _has_blocks(one)}
    loaded = {
        name: saved[name].model if name in saved else _module(one) for name, one in named.items()
    }
    prepared = preparing(loaded)
    entrants = {
        name: Entrant(
            model,
            prepared_images(data, prepared[name]),
            saved[name].blocks if name in saved else None,
        )
        for name, model in loaded.items()
    }
    return compare_entrants(entrants, against, progress)


def _by_name(models: Mapping[str, Any] | Sequence[Any], parameter: str) -> Mapping[str, Any]:
    """Models by the names to show; of those in a list that have none, their places."""
    if not isinstance(models, Mapping):
        models = {
            str(model) if isinstance(model, str | Path) else f"model {place}": model
            for place, model in enumerate(models, 1)
        }
    for name, model in models.items():
        fitted(model, Result | Saved | nn.Module | str | Path, f"{parameter}[{name!r}]")
    return models


@checked
def bench(
    original: nn.Module | str | Path,
    smalls: Mapping[str, Any] | Sequence[Any],
    settings: Settings | None = None,
    *,
    blocks: Mapping[str, Blocks] | None = None,
    say: Say | None = None,
    **changes: Any,
) -> Bench:
    """Time the original and compressed models in turn, in every setting.

    Args:
        original: what the models were made from, or its name; left as it is.
        smalls: results, modules or names by the names to show; or a list of them.
        settings: batch sizes, engines, dtypes, device, threads, rounds.
        blocks: where the blocks of a compressed model are; known of results and saved folders.
        say: called with one line on what is being done.
        changes: of ``settings``, such as ``batch_sizes=[1, 8]``.

    Raises:
        BlockfitError: where a model does not say what images it takes, or cannot run.
    """
    named = _by_name(smalls, "smalls")
    models: dict[str, nn.Module] = {}
    where: dict[str, Blocks] = {}
    for name, small in named.items():
        if _has_blocks(small):
            saved = as_saved(small)
            models[name], where[name] = saved.model, saved.blocks
        else:
            models[name] = _module(small)
    chosen = replace(settings or Settings(), **changes)
    return benchmark.bench(
        _module(original), models, chosen, blocks={**where, **(blocks or {})}, say=say or silent
    )


@checked
def export_plain(
    small: Result | Saved | str | Path,
    folder: str | Path,
    *,
    images: Any = None,
    dtype: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> ExportedFolder:
    """Write a compressed model as an ordinary checkpoint of its library.

    It has fewer blocks or narrower MLPs than the original, and loads where blockfit is not.

    Args:
        small: what ``compress`` returned, or a folder that ``save`` wrote.
        folder: new or empty; read back and compared with the model before it takes its name.
        images: to compare on; two sample photographs by default.
        dtype: of the weights, ``"float16"`` or ``"bfloat16"``; by default the model's own.
        base_model: repository of the original on the Hub, as ``OWNER/NAME``, for the model card;
            by default the model's name where it is one.
        license: of the original, for the model card; by default what the model states.
        overwrite: replace a checkpoint that lies there.

    Raises:
        BlockfitError: where the library's config cannot say what is left; nothing is written then.
    """
    check_target(folder, exported_folder.FORM, overwrite)
    Origin(base_model, license)  # refused before a model is loaded
    saved = as_saved(small)
    return plain.export_plain(
        saved,
        folder,
        images=_pictures(images, saved),
        dtype=dtype,
        base_model=base_model,
        license=license,
        overwrite=overwrite,
    )


@checked
def export_hub(
    small: Result | Saved | str | Path,
    folder: str | Path,
    *,
    images: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> ExportedFolder:
    """Write a compressed transformers model as a folder for the Hub, with code of its own.

    Args:
        small: as in ``export_plain``.
        folder: as in ``export_plain``.
        images: as in ``export_plain``.
        base_model: as in ``export_plain``.
        license: as in ``export_plain``.
        overwrite: replace a folder that was exported there.

    Raises:
        BlockfitError: for a model of another library, or where the outputs differ.
    """
    check_target(folder, exported_folder.FORM, overwrite)
    Origin(base_model, license)  # refused before a model is loaded
    saved = as_saved(small)
    return hub_folder.export_hub(
        saved,
        folder,
        images=_pictures(images, saved),
        base_model=base_model,
        license=license,
        overwrite=overwrite,
    )


@checked
def export_onnx(
    small: Result | Saved | nn.Module | str | Path, path: str | Path, **options: Any
) -> ExportedOnnx:
    """Write a model as an ONNX file; onnxruntime must give the same outputs before it is kept.

    Args:
        small: as in ``export_plain``, or any model.
        path: ends in ``.onnx``.
        options: of ``blockfit.formats.onnx_file.export_onnx``: ``images``, ``resolution``,
            ``batch``, ``opset``, ``dtype``, ``compare_levels``, ``overwrite``.

    Raises:
        BlockfitError: where it cannot be written or the outputs differ; nothing is left then.
    """
    check_file(path, onnx_file.FORM, bool(options.get("overwrite")))
    saved = as_saved(small)
    images = _pictures(options.pop("images", None), saved)
    return onnx_file.export_onnx(saved, path, images=images, **options)


@checked
def export_program(
    small: Result | Saved | nn.Module | str | Path, path: str | Path, **options: Any
) -> Exported:
    """Write a model as a ``.pt2`` file that ``torch.export.load`` reads where blockfit is not.

    Args:
        small: as in ``export_onnx``.
        path: ends in ``.pt2``.
        options: of ``blockfit.formats.program.export_program``: ``images``, ``resolution``,
            ``batch``, ``overwrite``.

    Raises:
        BlockfitError: where it cannot be written or the outputs differ; nothing is left then.
    """
    check_file(path, program.FORM, bool(options.get("overwrite")))
    saved = as_saved(small)
    images = _pictures(options.pop("images", None), saved)
    return program.export_program(saved, path, images=images, **options)


@checked
def push_to_hub(
    small: Result | Saved | nn.Module | str | Path,
    repository: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Upload a compressed model to the Hugging Face Hub, with huggingface_hub's own settings.

    As an ordinary checkpoint where the library's config can say what is left (``export_plain``),
    with code of its own otherwise (``export_hub``); an exported folder goes up as it is.

    Args:
        small: as in ``export_plain``, or a folder that it or ``export_hub`` wrote.
        repository: ``owner/name``.
        private: visible to its owner only, where the repository is new.
        overwrite: put the files into a repository that is there already.
        base_model: as in ``export_plain``, for the model card.
        license: as in ``export_plain``, for the model card.

    Returns:
        The address of the repository.

    Raises:
        BlockfitError: where no form for the Hub can hold the model, or the Hub refuses.
    """
    Origin(base_model, license)  # refused before a model is loaded
    how: dict[str, Any] = {"private": private, "overwrite": overwrite}
    card: dict[str, Any] = {"base_model": base_model, "license": license}
    if isinstance(small, (str, Path)) and not store.is_saved(small) and expanded(small).is_dir():
        return exported_folder.push_folder(Path(small), repository, **how, **card)
    saved = as_saved(small)
    stock = saved.plan.not_plain(saved.blocks.depth) is None
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        (export_plain if stock else export_hub)(saved, folder, **card)
        return exported_folder.push_folder(folder, repository, **how)


@checked
def report(
    runs: str | Path | Iterable[str | Path],
    path: str | Path = "report.html",
    *,
    pictures: str | Path | None = None,
) -> Path:
    """Explain runs on one HTML page that needs no network.

    Args:
        runs: folders of ``compress``, ``sweep``, ``analyze``, ``reproduce``; files that
            ``blockfit evaluate --json`` printed.
        path: new, or an earlier report.
        pictures: folder for every plot as PNG and SVG.

    Returns:
        Where the page is.

    Raises:
        BlockfitError: for a run that cannot be read, or where ``path`` is taken.
    """
    check_report(path)
    if pictures is not None:
        check_kept(pictures)
    content = read_runs([runs] if isinstance(runs, (str, Path)) else runs)
    write_report(content, path, pictures)
    return expanded(path)


@checked
def reproduce(
    model: nn.Module | str | Path,
    data: str | None,
    folder: str | Path,
    *,
    train: str | None = None,
    test: str | None = None,
    transfer: Sequence[str] = (),
    experiments: str | None = None,
    quick: bool = False,
    judge: str | None = None,
    limit: int | None = None,
    samples: Sequence[int] | None = None,
    seeds: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    blocks: str | None = None,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
    reads: Callable[[Images], None] = lambda images: None,
    **reading: Any,
) -> dict[str, Any]:
    """Run the experiments of the paper: tables, pictures and an index page in ``folder``.

    Args:
        model: the original, or its name.
        data: labelled images with a training and a test part; or ``None`` and both by themselves.
        folder: new, empty, or of an earlier run about the same, which is gone on with.
        train: the training part.
        test: the test part.
        transfer: other images to fit maps on.
        experiments: some of them, with commas between; all by default.
        quick: fewer images, spans and sizes.
        judge: ``head``, ``probe-fixed`` or ``probe-new``; the head where it fits the labels.
        limit: calibration images.
        samples: numbers of calibration images to compare.
        seeds: draws to average over.
        train_limit: images that probes learn from.
        test_limit: images that judge.
        seed: of every draw.
        blocks: dotted path of the list of blocks, where looking is not enough.
        say: called with one line on what is being done.
        progress: called with how many of how many are done of what was said last.
        note: called with what the run works with.
        warn: called with what the user should know.
        reads: called with the images that are used; ``description()`` says what is skipped.
        reading: other options of ``blockfit.images``.

    Returns:
        What ``reproduction.json`` holds.

    Raises:
        BlockfitError: unknown names, a compressed model, images without labels, a folder that is
            taken.
    """
    wanted = study.chosen(experiments)
    settings = setup.settings_for(quick, limit, samples, seeds, seed)
    target = resolved(folder)
    study.earlier(target)  # refuses a folder that is taken before anything is loaded
    sources = setup.Sources.of(
        data,
        train,
        test,
        quick=quick,
        transfer=transfer,
        train_limit=train_limit,
        test_limit=test_limit,
        reading=reading,
    )
    lab, about = setup.prepare(
        _module(model),
        sources,
        settings,
        judge=judge,
        blocks=blocks,
        say=say,
        progress=progress,
        reads=reads,
    )
    note(f"{lab.blocks.depth} blocks of width {lab.blocks.width}; judged by: {about['judge']}")
    return study.reproduce(lab, target, about, wanted, warn)


def _module(model: Any) -> nn.Module:
    """The module of a result, of a name, or itself."""
    if isinstance(model, (Result, Saved)):
        return model.model
    return store.module_of(model)


def _has_blocks(model: Any) -> bool:
    """Whether it is known where the blocks are, so that nobody has to look."""
    if isinstance(model, (Result, Saved)):
        return True
    return isinstance(model, (str, Path)) and store.is_saved(model)


def as_saved(model: Any) -> Saved:
    """A compressed model with its plan; an original one has an empty plan."""
    if isinstance(model, Saved):
        return model
    versions = installed_versions()
    if isinstance(model, Result):
        return Saved(model.model, model.blocks, model.plan, model.report, model.source, versions)
    if _has_blocks(model):
        return store.load_saved(model)
    whole = _module(model)
    if hasattr(whole, "blockfit_blocks"):
        return store.saved_of(whole)
    return Saved(whole, find_blocks(whole), Plan(), {}, source_of(whole), versions)


def given_data(
    images: Any, texts: Any, model: nn.Module, preprocessing: Given | None, seed: int
) -> Images:
    """What a verb was given as one set of batches: images, texts, or both.

    Raises:
        BlockfitError: for neither, and for texts that the model does not take.
    """
    if images is None and texts is None:
        raise BlockfitError("there is no data to run the model on: give images, texts= or both")
    if images is None:
        return texts if isinstance(texts, Images) else written_texts(texts, model, seed=seed)
    if texts is not None:
        check_two_towers(model)
    pictures = prepared_images(images, model, preprocessing, seed)
    return pictures if texts is None else pairs(pictures, texts, model)


def _pictures(images: Any, saved: Saved) -> Images | None:
    return None if images is None else prepared_images(images, saved.model)


Result.verbs.update(save=save, push_to_hub=push_to_hub, evaluate=evaluate)
sweeps.Frontier.verbs.update(from_sweep=from_sweep)
