"""A model with its calibration images: read once, then made smaller for any number of budgets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from blockfit.arguments import at_least, checked
from blockfit.data.images import Images
from blockfit.errors import BlockfitError, tell
from blockfit.evaluation.precision import overflow_warnings
from blockfit.fields import read
from blockfit.fit.plan import Plan, Span
from blockfit.formats.int8 import check_no_int8
from blockfit.models.cost import runs_on
from blockfit.models.load import source_with
from blockfit.progress import Teller
from blockfit.provenance import made
from blockfit.search.budget import Budget
from blockfit.search.final import Parts, final_figures, set_apart
from blockfit.search.loss_budget import Judge, check_images
from blockfit.search.reach import reach
from blockfit.search.recipes import Recipe, recipe_for
from blockfit.search.run import Result, checkpoint_of, describe, run_json
from blockfit.search.session import Session
from blockfit.search.setting import CALIBRATION_IMAGES, HOLD_OUT, Setting, check_stages
from blockfit.search.span_search import check_removed
from blockfit.search.sweep import Frontier
from blockfit.units import bytes_of

LOSSES = ("max_kl", "max_drop")
"""Budgets that images decide on which nothing else is decided by."""

OPTIONS = (
    "map", "rank", "per_token_type", "cuts", "uniform", "ridge", "prefix_weight", "repair",
    "repair_ridge",
)  # fmt: skip
"""Of a recipe, that a call may change."""


@dataclass(frozen=True)
class Held:
    """What a calibration keeps to itself, whatever the budget.

    Args:
        protect: blocks that must stay; their parts may be narrowed.
        whole: blocks that nothing may cut.
        multiple_of: widths that MLPs keep are multiples of it.
        hold_out: part of the images that chooses plans and is not fitted on.
        max_memory: bytes that moments and hidden states may take.
    """

    protect: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    multiple_of: int | None = None
    hold_out: float = HOLD_OUT
    seed: int = 0
    max_memory: int | None = None
    resume: str | Path | None = None

    @classmethod
    def of(
        cls,
        *,
        protect: Iterable[int],
        whole: Iterable[int],
        max_memory: int | str | None,
        **rest: Any,
    ) -> Held:
        """The same as users write it.

        Raises:
            BlockfitError: for numbers that are none.
        """
        room = None if max_memory is None else bytes_of(str(max_memory), "max_memory")
        held = cls(tuple(protect), tuple(whole), max_memory=room, **rest)
        at_least(0, seed=held.seed)
        at_least(1, multiple_of=held.multiple_of)
        return held


class Calibration:
    """A model and images that it was run on; makes small models for any number of budgets.

    What ``blockfit.calibrate`` returns. The original is left as it is. Hidden states are kept in
    memory (up to ``max_memory``) as long as the calibration lives.

    Args:
        model: the original.
        images: of which the calibration draws.
        recipe: what a call means that names no other.
        asked: arguments of ``recipe_for`` that it was made of.
        held: what is the same for all budgets.
        blocks: dotted path of the list of blocks, where looking is not enough.
        final: images for the final figures alone.
        judging: whether images are set apart to judge budgets of loss.
        teller: is told how far it is.
        budget: is refused at once where the images cannot decide on it.
        force_budget: judge it by what is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        recipe: Recipe,
        asked: Mapping[str, Any],
        held: Held,
        *,
        blocks: str | None = None,
        final: int | None = None,
        judging: bool = False,
        teller: Teller,
        budget: Budget | None = None,
        force_budget: bool = False,
    ) -> None:
        self.recipe, self._asked, self._held, self._teller = recipe, asked, held, teller
        check_no_int8(model, "compressed")
        self._source = source_with(model, images.preprocessing)
        drawn = images.draw(CALIBRATION_IMAGES, held.seed)
        self.parts: Parts = set_apart(drawn, final, judging, held.seed)
        if budget is not None:
            check_images(budget, self.parts, force_budget)
        self._known: Mapping[str, Any] = {}
        self.setting = Setting.of(model, self.parts.calibration, blocks, held.hold_out, held.seed)

    @cached_property
    def session(self) -> Session:
        """The calibration itself; the original is run at the first use."""
        held, setting = self._held, self.setting
        narrowing = {"whole": sorted({*held.whole}), "multiple_of": held.multiple_of}
        told = (setting.model, self.parts, self.recipe, held.protect, held.hold_out, held.seed)
        run = {**run_json(*told, kept=held.resume is not None), **narrowing}
        checkpoint = checkpoint_of(held.resume, run, self.parts.calibration, setting.blocks)
        how = (self._teller.say, self._teller.count, checkpoint, held.max_memory)
        cut = (held.whole, held.multiple_of)
        session = Session(setting, self.recipe, held.protect, held.seed, *how, *cut)
        if self._known:
            session.cuts.restore(self._known)
        return session

    @classmethod
    def of_sweep(
        cls,
        frontier: Frontier,
        model: nn.Module,
        images: Images,
        budget: Budget,
        *,
        max_memory: int | str | None = None,
        **how: Any,
    ) -> Calibration:
        """A calibration as that of a sweep; curves and effects are the sweep's.

        Args:
            frontier: the sweep; of parts of blocks.
            model: the original.
            images: on which plans are solved and judged.
            budget: what they are for.
            max_memory: as in ``blockfit.compress``.
            how: ``final``, ``teller`` and ``force_budget`` of a calibration.

        Raises:
            BlockfitError: where the sweep has no curves, or they are of another model.
        """
        content, run = frontier.content, frontier.content.run
        if "curves" not in content.search:
            raise BlockfitError(
                f"the sweep {frontier.folder} is over whole blocks and has a plan for every number "
                "of them; leave images= out"
            )
        recipe = read(Recipe, run.recipe, "the sweep's recipe")
        held = Held.of(
            protect=run.protect,
            whole=run.whole or (),
            multiple_of=run.multiple_of,
            hold_out=run.hold_out,
            seed=run.seed,
            max_memory=max_memory,
        )
        judging = budget.kind in LOSSES
        path = None if content.blocks.stages else content.blocks.path
        at: dict[str, Any] = {"blocks": path, "judging": judging, "budget": budget, **how}
        made = cls(model, images, recipe, {"recipe": recipe}, held, **at)
        made._known = content.search
        return made

    def run(self) -> Calibration:
        """Run the original on the images now, where that has not been done."""
        with self._teller:
            assert self.session is not None
        return self

    def __repr__(self) -> str:
        images = len(self.parts.calibration.positions)
        name, depth = self._source.name, self.setting.blocks.depth
        return f"Calibration({name}, {depth} blocks, {images} images, recipe {self.recipe.name})"

    @checked
    def compress(
        self,
        *,
        spans: Iterable[Span | str | tuple[int, int]] | None = None,
        plan: Plan | None = None,
        remove: int | None = None,
        params: float | str | None = None,
        flops: float | str | None = None,
        latency: float | str | None = None,
        max_kl: float | None = None,
        max_drop: float | None = None,
        force_budget: bool = False,
        recipe: str | Recipe | None = None,
        **changes: Any,
    ) -> Result:
        """A small model for one more budget, without calibrating again.

        ``spans``, ``plan`` and the budgets are those of ``blockfit.compress``.

        Args:
            max_kl: of calibrations with ``judge=True``; ``max_drop`` likewise.
            force_budget: judge both by what is measured.
            recipe: another one than the calibration's.
            changes: of the recipe: ``map``, ``rank``, ``per_token_type``, ``cuts``, ``uniform``,
                ``ridge``, ``prefix_weight``, ``repair``, ``repair_ridge``.

        Raises:
            BlockfitError: as ``blockfit.compress``; the calibration can be used again.
        """
        started = time.perf_counter()
        if unknown := [name for name in changes if name not in OPTIONS]:
            raise BlockfitError(
                f"unknown option {unknown[0]!r}; a calibration can be used with another recipe, "
                f"{', '.join(OPTIONS)}; all else needs a calibration of its own"
            )
        budget = Budget.of(
            remove=remove,
            params=params,
            flops=flops,
            latency=latency,
            max_kl=max_kl,
            max_drop=max_drop,
        )
        asked = {**self._asked, **changes} if recipe is None else {"recipe": recipe, **changes}
        chosen = recipe_for(spans_given=spans is not None, **asked)
        wanted = by_hand(spans, plan, budget, chosen, self._held)
        if budget is not None and budget.kind in LOSSES:
            if self.parts.judge is None:
                raise BlockfitError(
                    f"the calibration has set no images apart that could judge {budget.kind}=; "
                    "make it with judge=True"
                )
            check_images(budget, self.parts, force_budget)
        with self._teller:
            result = self.solved(chosen, wanted, budget, force_budget, started)
        tell(result.report["warnings"], stacklevel=3)
        return result

    def solved(
        self,
        recipe: Recipe,
        plan: Plan | None,
        budget: Budget | None,
        force_budget: bool,
        started: float,
        inplace: bool = False,
    ) -> Result:
        """The small model of a plan or a budget, with its report.

        Args:
            recipe: how it is solved.
            plan: by hand; or ``None``.
            budget: what has to be reached where there is no plan.
            force_budget: judge it by what is measured.
            started: when the call began, of ``time.perf_counter``.
            inplace: change the model itself; the calibration is of no use then.
        """
        setting, parts, seed = self.setting, self.parts, self._held.seed
        if plan is not None:
            plan.check(setting.blocks.depth, {*self._held.protect, *self._held.whole})
        check_stages(setting.blocks, recipe, budget, plan)
        if budget is not None and budget.kind == "remove":
            kept = {*self._held.protect, *self._held.whole}
            check_removed(int(budget.value), setting.blocks.depth, kept)
        session, judge = self.session, None
        if recipe != session.recipe:
            session = session.with_recipe(recipe)
        if budget is not None and budget.kind in LOSSES and parts.judge is not None:
            at = (setting.model, setting.blocks, parts.judge)
            judge = Judge(budget, *at, seed, force_budget, self._teller.count)
        if plan is not None:
            point = session.by_hand(plan)
        else:
            assert budget is not None
            point = reach(session, budget, judge)
        found = None
        if parts.final is not None:
            self._teller.say(f"final figures on {len(parts.final)} images")
            what = (setting.model, point.solution, setting.blocks, parts.final, seed, parts.apart)
            found = final_figures(*what, self._teller.count)
        report = describe(session, point, parts, budget, judge, found)
        if inplace:
            small = setting.model
            point.solution.apply(small, setting.blocks)
        else:
            small = point.solution.built(setting.model, setting.blocks)
        report["warnings"] += overflow_warnings(small, setting.blocks, setting.example)
        report["made"] = made(runs_on(small))
        report["seconds"] = round(time.perf_counter() - started, 3)
        return Result(small, point.solution.plan, report, setting.blocks, self._source)


def by_hand(
    spans: Iterable[Span | str | tuple[int, int]] | None,
    plan: Plan | None,
    budget: Budget | None,
    recipe: Recipe,
    held: Held,
) -> Plan | None:
    """The plan that a call names; ``None`` where it names a budget.

    Raises:
        BlockfitError: where it names nothing or more than one of the three.
    """
    spans = None if spans is None else list(spans)
    if spans == []:
        raise BlockfitError("spans is empty; name what goes, such as ['2:4']")
    if [spans, plan, budget].count(None) != 2:
        raise BlockfitError(
            "say what to remove: spans= by hand, a plan=, or one budget (remove=, params=, "
            "flops=, latency=, max_kl= or max_drop=)"
        )
    beside = {"protect": held.protect, "whole": held.whole, "multiple_of": held.multiple_of}
    recipe.check_use("spans= or plan=" if budget is None else f"{budget.kind}=", **beside)
    if spans is None:
        if plan is not None and not plan:
            raise BlockfitError("the plan cuts nothing; give one with spans or narrowings")
        return plan
    options: dict[str, Any] = {"per_token_type": recipe.per_token_type}
    if recipe.maps[-1] == "low-rank":
        options["rank"] = recipe.rank
    return Plan.of(spans, recipe.maps[-1], **options)
