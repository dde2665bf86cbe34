"""``load``, ``images``, ``compress``, ``save``: the few calls that most users need."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from blockfit import store
from blockfit.amounts import bytes_of
from blockfit.blocks import Blocks
from blockfit.budget import Budget, unresolved
from blockfit.data import Images, images
from blockfit.data import images as open_images
from blockfit.errors import BlockfitError
from blockfit.int8 import check_no_int8
from blockfit.models import load_model, source_of
from blockfit.precision import overflow_warnings
from blockfit.recipes import Recipe
from blockfit.recipes import recipe as named_recipe
from blockfit.repair import Options
from blockfit.resume import Checkpoint, settled
from blockfit.search import Point
from blockfit.session import HOLD_OUT, Progress, Say, Session, Setting
from blockfit.source import Source
from blockfit.spans import Plan, Span
from blockfit.tensors import fingerprint


@dataclass(frozen=True)
class Result:
    """A compressed model and how it came about.

    Args:
        model: ready to use; same class, signature and output as the original.
        plan: what was removed and what stands there now.
        report: JSON values: sizes, held-out fidelity, errors of the maps, calibration, warnings.
        blocks: where the blocks are.
        source: the original model, for saving.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]
    blocks: Blocks
    source: Source


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


def recipe_for(
    recipe: str | Recipe,
    spans_given: bool = False,
    *,
    map: str | None = None,
    rank: int | None = None,
    per_token_type: bool | None = None,
    **solving: Any,
) -> Recipe:
    """The recipe that a call means.

    Spans written by hand get the map that was asked for and nothing else: no repair, unless the
    call names one or a recipe other than the default. ``None`` values change nothing.

    Args:
        recipe: a name, or a recipe to start from.
        spans_given: spans were written by hand.
        map: the only kind of map.
        rank: of low-rank maps.
        per_token_type: one map for prefix and one for patch tokens.
        solving: fields of ``Options``; ``ridge`` may be ``"auto"``.
    """
    maps = None if map is None else (map,)
    changes = {"maps": maps, "rank": rank, "per_token_type": per_token_type}
    chosen = named_recipe(recipe, **{k: v for k, v in changes.items() if v is not None})
    given = {k: v for k, v in solving.items() if v is not None}
    if "ridge" in given:
        given["ridge"] = _ridge(given["ridge"])
    if spans_given and "repair" not in given and chosen.name == "default" and recipe == "default":
        given["repair"] = "none"
    return dataclasses.replace(chosen, options=dataclasses.replace(chosen.options, **given))


def _ridge(value: float | str) -> float | None:
    """λ as a number; ``None`` for ``auto``."""
    try:
        return None if value == "auto" else float(value)
    except ValueError:
        raise BlockfitError(
            f"cannot read {value!r} as ridge; give a number, such as 1e-4, or auto"
        ) from None


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


def describe(
    session: Session, point: Point, images: Images, budget: Budget | None
) -> dict[str, Any]:
    """The report of a run, as JSON values."""
    plan = point.solution.plan
    parameters, flops = session.sizes.of(plan)
    return {
        "budget": None if budget is None else str(budget),
        "recipe": recipe_json(session.recipe),
        "seed": session.seed,
        "protect": list(session.protected),
        "removed_blocks": len(plan.removed_blocks),
        "parameters_before": session.sizes.parameters,
        "parameters_after": parameters,
        "flops_before": session.sizes.flops,
        "flops_after": flops,
        "calibration": {
            **images.description(),
            "fit": len(session.setting.fit),
            "held_out": len(session.setting.held_out),
        },
        "held_out": dataclasses.asdict(point.fidelity),
        "top1_before": session.held_out.top1,
        "top1_after": point.top1,
        "maps": [dataclasses.asdict(error) for error in point.map_errors],
        "repaired_blocks": session.repaired_blocks(point),
        "warnings": session.warnings(point) + unresolved(budget, len(session.setting.held_out)),
    }


def run_json(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    protect: Iterable[int],
    hold_out: float,
    seed: int,
) -> dict[str, Any]:
    """What a run's search depends on, as JSON values."""
    run = {
        "recipe": recipe_json(recipe),
        "protect": sorted(set(protect)),
        "hold_out": hold_out,
        "seed": seed,
        "model": fingerprint(model),
        "calibration": settled(images.description()),
    }
    return dict(json.loads(json.dumps(run)))


def checkpoint_of(
    folder: str | Path | None, run: Mapping[str, Any], images: Images, blocks: Blocks
) -> Checkpoint | None:
    """Where a run saves its progress; ``None`` without a folder."""
    if folder is None:
        return None
    how = {"batch_size": images.batch_size, "blocks": dataclasses.asdict(blocks)}
    return Checkpoint(folder, {**run, **how})


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON values."""
    values = dataclasses.asdict(recipe)
    values["maps"] = list(recipe.maps)
    return values


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
