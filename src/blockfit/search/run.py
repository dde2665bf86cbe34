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
from blockfit.command_line import command_line
from blockfit.data.images import Images
from blockfit.fields import fields_written
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks
from blockfit.models.source import Source, attach
from blockfit.models.tensors import fingerprint
from blockfit.search.budget import Budget
from blockfit.search.final import Final, Parts
from blockfit.search.loss_budget import Judge, beyond_bound
from blockfit.search.recipes import Recipe, recipe_json
from blockfit.search.report import Entry, Original, Report
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


def original_of(session: Session) -> Original:
    """Figures of the original."""
    sizes = session.sizes
    return Original(sizes.parameters, sizes.flops, session.held_out.top1)


def entry_of(session: Session, point: Point, final: Final | None = None) -> Entry:
    """What is written down of a solved plan, in a sweep or in a report."""
    plan = point.solution.plan
    parameters, flops = session.sizes.of(plan)
    return Entry(
        removed=point.removed,
        plan=plan,
        parameters=parameters,
        flops=flops,
        held_out=point.fidelity,
        top1=point.top1,
        maps=point.map_errors,
        repaired_blocks=tuple(session.repaired_blocks(point)),
        warnings=tuple(session.warnings(point)),
        final=None if final is None else final.to_json(),
    )


def describe(
    session: Session,
    point: Point,
    parts: Parts,
    budget: Budget | None,
    judge: Judge | None = None,
    final: Final | None = None,
) -> dict[str, Any]:
    """The report of a run, as JSON values."""
    verdict = None if judge is None else judge.decided.get(point.solution.plan)
    beyond = [] if budget is None or verdict is None else beyond_bound(budget, verdict)
    calibration = {
        **parts.whole.description(),
        "fit": len(session.setting.fit),
        "held_out": len(session.setting.held_out),
        "judged": 0 if parts.judge is None else len(parts.judge),
        "final": 0 if parts.final is None else len(parts.final),
    }
    report = Report.of(
        original_of(session),
        entry_of(session, point, final),
        budget,
        verdict,
        tuple(beyond),
        recipe=recipe_json(session.recipe),
        seed=session.seed,
        calibration=calibration,
        protect=session.protected,
        command=command_line(),
    )
    return fields_written(report)


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
