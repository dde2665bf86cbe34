"""``load``, ``images``, ``compress``, ``save``: the few calls that most users need."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from blockfit.data.images import Images, images
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.precision import overflow_warnings
from blockfit.fit.plan import Plan, Span
from blockfit.formats import folder as store
from blockfit.formats.int8 import check_no_int8
from blockfit.models.load import load_model, source_of
from blockfit.search.budget import Budget
from blockfit.search.recipes import Recipe, recipe_for
from blockfit.search.run import Result, checkpoint_of, describe, run_json
from blockfit.search.session import HOLD_OUT, Progress, Say, Session, Setting
from blockfit.search.solve import Options
from blockfit.units import bytes_of


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
        return store.load(name, model=model, **options)
    if model is not None:
        raise BlockfitError(f"{name} is no folder saved by blockfit; leave model= away")
    return load_model(str(name), **options)


def compress(
    model: nn.Module | str | Path,
    images: Any,
    *,
    spans: Iterable[Span | str] | None = None,
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
    protect: Iterable[int] = (),
    blocks: str | None = None,
    hold_out: float = HOLD_OUT,
    seed: int = 0,
    inplace: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
    max_memory: int | str | None = None,
) -> Result:
    """Replace redundant runs of blocks by closed-form maps, without training.

    Give ``spans`` or one budget. The images need no labels.

    Args:
        model: any module whose blocks map (batch, tokens, width) to the same shape, or a name.
        images: ``Images``, or whatever ``blockfit.images`` takes.
        spans: what goes, by hand: ``["2:4", "9:11"]``.
        remove: how many blocks go.
        params: the part of the parameters that may remain: ``0.62`` or ``"62%"``.
        flops: the same of the floating-point operations of one forward.
        latency: the same of the latency, measured on this machine.
        max_kl: largest held-out KL divergence of the output, in nats.
        max_drop: largest loss of top-1 in points, on the held-out images' labels.
        recipe: ``default``, ``paper``, ``plain``, or a ``Recipe``.
        map: kind of map, instead of the recipe's.
        rank: of ``low-rank`` maps.
        per_token_type: one map for prefix and another for patch tokens.
        ridge: λ of the maps, instead of the recipe's; ``"auto"`` chooses it for each map.
        prefix_weight: weight of a prefix token in every fit, where a patch token weighs 1.
        repair: ``none``, ``mlp`` or ``mlp+attention``, instead of the recipe's.
        repair_ridge: λ of the repairs, towards the original weights.
        protect: blocks that must stay because something reads their output.
        blocks: dotted path of the list of blocks, where looking is not enough.
        hold_out: part of the images that judges and is not fitted on.
        seed: of every draw.
        inplace: change ``model`` itself instead of a copy.
        say: called with one line on what is being done.
        progress: called with how many of how many (images, blocks) are done of what was said last.
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
    spans = None if spans is None else list(spans)
    if (spans is None) == (budget is None):
        raise BlockfitError(
            "say what to remove: spans by hand or one budget (remove, params, flops, latency, "
            "max_kl or max_drop)"
        )
    chosen = recipe_for(
        recipe,
        spans is not None,
        map=map,
        rank=rank,
        per_token_type=per_token_type,
        ridge=ridge,
        prefix_weight=prefix_weight,
        repair=repair,
        repair_ridge=repair_ridge,
    )
    plan = None
    if spans is not None:
        options: dict[str, Any] = {"per_token_type": chosen.per_token_type}
        if chosen.maps[-1] == "low-rank":
            options["rank"] = chosen.rank
        plan = Plan.of(spans, chosen.maps[-1], **options)
    if not isinstance(model, nn.Module):
        model, inplace = load(model), True
    if not isinstance(images, Images):
        images = open_images(images, model, seed=seed)
    check_no_int8(model, "compressed")
    source = source_of(model)
    setting = Setting.of(model, images, blocks, hold_out, seed)
    if plan is not None:
        plan.check(setting.blocks.depth, protect)
    room = None if max_memory is None else bytes_of(str(max_memory))
    run = run_json(model, images, chosen, protect, hold_out, seed)
    checkpoint = checkpoint_of(resume, run, images, setting.blocks)
    session = Session(setting, chosen, protect, seed, say, progress, checkpoint, room)
    if plan is not None:
        point = session.by_hand(plan)
    else:
        assert budget is not None
        point = session.reach(budget)
    report = describe(session, point, images, budget)
    small = model if inplace else copy.deepcopy(model)
    point.solution.apply(small, setting.blocks)
    report["warnings"] += overflow_warnings(small, setting.blocks, next(iter(images)))
    report["seconds"] = round(time.perf_counter() - started, 3)
    return Result(small, point.solution.plan, report, setting.blocks, source)


def save(result: Result, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a result to a folder that ``load`` reads: JSON and safetensors, whole or not at all.

    Raises:
        BlockfitError: where the folder is taken or cannot be written.
    """
    store.save(
        folder,
        result.model,
        result.blocks,
        result.plan,
        source=result.source,
        report=result.report,
        overwrite=overwrite,
    )


__all__ = ["Options", "Result", "compress", "images", "load", "save"]
