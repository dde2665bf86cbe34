"""What one run was: its result, its report as JSON values, and where its progress is saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from blockfit.checkpoint import Checkpoint, settled
from blockfit.data.images import Images
from blockfit.fields import fields_written
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks
from blockfit.models.source import Source, attach
from blockfit.models.tensors import fingerprint
from blockfit.provenance import command_line
from blockfit.search.budget import Budget
from blockfit.search.final import Final, Parts
from blockfit.search.loss_budget import Judge, beyond_bound
from blockfit.search.plan_judge import Point
from blockfit.search.recipes import Recipe
from blockfit.search.report import Entry, Original, Report
from blockfit.search.session import Session
from blockfit.search.summaries import compression, figure_rows, plan_lines
from blockfit.summary import Summary, frame
from blockfit.units import amount, share


@dataclass(frozen=True, repr=False)
class Result:
    """A compressed model and how it came about.

    ``save``, ``push_to_hub`` and ``evaluate`` are the functions of the same names in ``blockfit``,
    which ``blockfit.api`` puts into ``verbs``: a search knows no format and no evaluation.

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

    verbs: ClassVar[dict[str, Callable[..., Any]]] = {}
    """Name of a method → the function that does it."""

    def __post_init__(self) -> None:
        attach(self.model, self.source)
        self.model.__dict__["blockfit_report"] = self.report

    def __repr__(self) -> str:
        report = self.report
        before, after = report["parameters_before"], report["parameters_after"]
        kl = report["held_out"]["kl"]
        told = "" if kl is None else f", KL {kl:.3g}"
        left = share(after, before)
        return f"Result({left} of {amount(before)} parameters{told}, {self.plan.brief})"

    def summary(self, maps: bool = False) -> Summary:
        """Sizes before and after, fidelity, final figures and a verdict, as the command prints.

        Args:
            maps: with the held-out error of every map, beside that of leaving its span out.
        """
        found = compression(self.report, self.blocks.depth, maps)
        return Summary.of(plan_lines(self.plan), found, warnings=self.report["warnings"])

    def _repr_html_(self) -> str:
        found = compression(self.report, self.blocks.depth)
        return Summary.of(self.plan.brief, found)._repr_html_()

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with a row per figure.

        The index is its name; columns are ``original``, ``compressed``, the ``low`` and ``high``
        end of the interval, ``images`` that it is of, and ``on`` which: ``held out`` (they chose
        the plan) or ``final`` (they decided nothing). Fractions are fractions, not percent.

        Raises:
            BlockfitError: where pandas is not installed.
        """
        return frame(figure_rows(self.report, self.blocks.depth), ["figure"])

    def plot(self, ax: Any = None) -> Any:
        """Draw what is left of every block: ``plot`` of the plan; returns matplotlib's axes.

        Raises:
            BlockfitError: where matplotlib is not installed.
        """
        return self.plan.plot(self.blocks.depth, ax)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """``blockfit.save`` of it: write a new folder that ``blockfit.load`` reads.

        Raises:
            BlockfitError: where the folder is taken or cannot be written.
        """
        self.verbs["save"](self, folder, overwrite=overwrite)

    def push_to_hub(
        self, repository: str, *, private: bool = False, overwrite: bool = False, **card: Any
    ) -> str:
        """``blockfit.push_to_hub`` of it; ``card`` are ``base_model`` and ``license``.

        Returns:
            The address of the repository.

        Raises:
            BlockfitError: where no form for the Hub can hold the model, or the Hub refuses.
        """
        push = self.verbs["push_to_hub"]
        return str(push(self, repository, private=private, overwrite=overwrite, **card))

    def evaluate(self, data: Any, **options: Any) -> Any:
        """``blockfit.evaluate`` of it, with all its options, such as ``against``, the original.

        Raises:
            BlockfitError: as ``blockfit.evaluate``.
        """
        return self.verbs["evaluate"](self, data, **options)


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
        "views": session.views,
        "judged": 0 if parts.judge is None else len(parts.judge),
        "final": 0 if parts.final is None else len(parts.final),
    }
    report = Report.of(
        original_of(session),
        entry_of(session, point, final),
        budget,
        verdict,
        tuple(beyond),
        recipe=fields_written(session.recipe),
        seed=session.seed,
        calibration=calibration,
        protect=session.protected,
        fitted=session.fitted(point.solution),
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
    kept: bool = True,
) -> dict[str, Any]:
    """What a run's search depends on, as JSON values; with the images' content where ``kept``."""
    run = {
        "recipe": fields_written(recipe),
        "protect": sorted(set(protect)),
        "hold_out": hold_out,
        "seed": seed,
        "model": fingerprint(model),
        "calibration": settled(parts.whole.description(), parts.whole.digest() if kept else None),
        "apart": [len(p.positions) for p in (parts.judge, parts.final) if p is not None],
    }
    return dict(json.loads(json.dumps(run)))


def checkpoint_of(
    folder: str | Path | None, run: Mapping[str, Any], images: Images, blocks: Blocks
) -> Checkpoint | None:
    """Where a run saves its progress; ``None`` without a folder."""
    if folder is None:
        return None
    how = {"batch_size": images.batch_size, "blocks": blocks.to_json()}
    return Checkpoint(folder, {**run, **how})
