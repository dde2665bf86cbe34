"""What one run was: its result, its report as JSON values, and where its progress is saved."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from blockfit.checkpoint import Checkpoint, settled
from blockfit.data.images import Images
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks
from blockfit.models.source import Source, attach
from blockfit.models.tensors import fingerprint
from blockfit.search.budget import Budget
from blockfit.search.final import Final, Parts
from blockfit.search.loss_budget import Judge, beyond_bound
from blockfit.search.recipes import Recipe, recipe_json
from blockfit.search.session import Session
from blockfit.search.span_search import Point


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

    def __post_init__(self) -> None:
        attach(self.model, self.source)
        self.model.__dict__["blockfit_report"] = self.report


def describe(
    session: Session,
    point: Point,
    parts: Parts,
    budget: Budget | None,
    judge: Judge | None = None,
    final: Final | None = None,
) -> dict[str, Any]:
    """The report of a run, as JSON values.

    ``held_out`` and ``top1_before``, ``top1_after`` are of the images that chose the plan,
    ``final`` of images that decided nothing.
    """
    plan, verdict = point.solution.plan, None
    if judge is not None:
        verdict = judge.decided.get(plan)
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
            **parts.whole.description(),
            "fit": len(session.setting.fit),
            "held_out": len(session.setting.held_out),
            "judged": 0 if parts.judge is None else len(parts.judge),
            "final": 0 if parts.final is None else len(parts.final),
        },
        "final": None if final is None else final.to_json(),
        "judged": None if verdict is None else verdict.to_json(),
        "held_out": dataclasses.asdict(point.fidelity),
        "top1_before": session.held_out.top1,
        "top1_after": point.top1,
        "maps": [dataclasses.asdict(error) for error in point.map_errors],
        "repaired_blocks": session.repaired_blocks(point),
        "warnings": session.warnings(point)
        + ([] if budget is None or verdict is None else beyond_bound(budget, verdict)),
    }


def run_json(
    model: nn.Module,
    parts: Parts,
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
        "calibration": settled(parts.whole.description()),
        "apart": [len(p.positions) for p in (parts.judge, parts.final) if p is not None],
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
