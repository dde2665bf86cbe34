"""One calibration and everything that is answered from it, for compress and sweep."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.checkpoint import Checkpoint
from blockfit.data.images import Images
from blockfit.errors import BlockfitError, first_line
from blockfit.fit.moments import Moments
from blockfit.fit.plan import PARTS, Narrowing, Plan, Span, spans_up_to
from blockfit.models.adapters import check_merged
from blockfit.models.blocks import Batch, Blocks, named_blocks
from blockfit.models.forward import FORWARD_ERRORS, evaluating, first_images, offloaded
from blockfit.models.load import source_of
from blockfit.models.stages import find_blocks
from blockfit.models.stock import Stock
from blockfit.models.surgery import removed_plan
from blockfit.models.tensors import narrowest
from blockfit.models.trace import trace
from blockfit.progress import Progress, Say
from blockfit.search.baselines import Baseline, Neurons
from blockfit.search.budget import Budget, Sizes
from blockfit.search.calibrate import TOKENS_PER_IMAGE, calibrate, moments_of
from blockfit.search.cuts import CutSearch, Share
from blockfit.search.held_out import HeldOut
from blockfit.search.latency import latency_of
from blockfit.search.loss_budget import Judge, Verdict, furthest
from blockfit.search.plan_judge import PlanJudge, Point
from blockfit.search.recipes import Recipe
from blockfit.search.solve import Solution
from blockfit.search.span_search import QUICK_IMAGES, Search, most_removed
from blockfit.search.spill import (
    MOMENTS_SHARE,
    STATES_SHARE,
    GroupedMoments,
    Shelf,
    check_batch,
    groups_of,
)
from blockfit.search.states import TracedImages

HOLD_OUT = 0.2
CALIBRATION_IMAGES = 512
"""Drawn where nobody says how many (docs/measurements.md: more gain little)."""

JUDGE_BATCH = 16
"""Batch size of the held-out images: the unit in which the race of candidates spends them."""

FEWEST_IMAGES = 8
SAFE_LOSS = 0.1
"""Held-out loss above which a warning is due: KL in nats, relative feature error without a head."""

SHARES = (0.97, 0.94, *(share / 100 for share in range(90, 24, -4)))
"""Parts of the parameters that may remain, tried in turn under a budget of loss."""


@dataclass(frozen=True)
class Setting:
    """What a run is about: the model, where its blocks are, and the parts of the images."""

    model: nn.Module
    blocks: Blocks
    fit: Images
    held_out: Images
    example: Batch
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Images,
        path: str | None = None,
        hold_out: float = HOLD_OUT,
        seed: int = 0,
    ) -> Setting:
        """Find the blocks and split the images.

        Raises:
            BlockfitError: no blocks, a model that is compressed already, fewer than
                ``FEWEST_IMAGES`` images.
        """
        if len(images) < FEWEST_IMAGES:
            raise BlockfitError(
                f"{len(images)} calibration images are too few; give at least {FEWEST_IMAGES}, "
                "better a few hundred"
            )
        if offloaded(model):
            raise BlockfitError(
                "some of the model's weights are offloaded (on the meta device), and a "
                "compression changes weights; load it whole, or spread it over devices "
                "(device_map), or only calibrate or analyze it"
            )
        example = next(iter(images))
        blocks = find_blocks(model, example, path)
        if done := removed_plan(model, blocks):
            raise BlockfitError(
                f"the model is compressed already ({done}); compress the original again instead"
            )
        if done := _elsewhere(model, blocks):
            raise BlockfitError(
                f"another part of the model is compressed already ({done}); compress the original, "
                "with images and texts in one call for both towers of a model"
            )
        check_merged(model)
        fit, held_out = images.split(hold_out, seed)
        fit = replace(fit, batch_size=_fit_batch(fit.batch_size))
        held_out = replace(held_out, batch_size=JUDGE_BATCH)
        return cls(model, blocks, fit, held_out, example, changing(images))

    def state(self) -> Tensor:
        """The first hidden state of one image, shape (1, tokens, width)."""
        with evaluating(self.model):
            return trace(self.model, self.blocks, first_images(self.example, 1), [0]).states[0]


def _elsewhere(model: nn.Module, blocks: Blocks) -> Plan:
    """What was taken out of the model at other blocks than these."""
    known = getattr(model, "blockfit_blocks", None)
    return Plan() if known is None or known == blocks else removed_plan(model, known)


def changing(images: Images) -> tuple[str, ...]:
    """What to tell where images are others each time that they are read."""
    if not images.changing:
        return ()
    return (
        f"the images of {images.records.source} differ each time that they are read (a random "
        "augmentation, or a shuffled order), but a calibration reads them several times; give "
        "images that stay the same",
    )


def _fit_batch(asked: int) -> int:
    """The largest power of two up to what was asked for and ``QUICK_IMAGES``.

    Batches then end where the quick refits do, so that these see the same images at any batch size.
    """
    return 1 << (min(asked, QUICK_IMAGES).bit_length() - 1)


def check_whole(whole: Iterable[int], depth: int) -> None:
    """Refuse blocks that do not exist."""
    for block in whole:
        if not 0 <= block < depth:
            raise BlockfitError(
                f"whole: block {block} does not exist; the model has blocks 0–{depth - 1}"
            )


def _any(plan: Plan) -> bool:
    """Where no stock config has to say it."""
    return True


def _laid_out(part: Narrowing) -> str:
    layers = ", ".join(f"{rows.layer} from row {rows.start}" for rows in part.rows)
    return f"{part.heads} × {part.size} in {layers}"


def check_stages(
    blocks: Blocks, recipe: Recipe, budget: Budget | None = None, plan: Plan | None = None
) -> None:
    """Refuse, before any work, what cannot be done with blocks in stages.

    Raises:
        BlockfitError: for spans of any kind, and for one width of all MLPs.
    """
    if budget is not None and budget.kind == "remove":
        blocks.need_chain("remove=")
    if plan is not None and plan.replacements:
        blocks.need_chain("a plan that removes blocks")
    if blocks.stages and recipe.uniform:
        raise BlockfitError(
            "uniform= gives the MLPs of all blocks one width, and those of this model's "
            f"{len(blocks.stages)} stages have their own; leave it away"
        )
    if plan is None and recipe.baseline is None and not recipe.narrows:
        blocks.need_chain(f"a recipe that cuts {' and '.join(recipe.cuts)} alone")


class Session:
    """Calibrates once; then finds plans for any number of budgets.

    Args:
        setting: model and images.
        recipe: maps, selection, refit and repair.
        protected: blocks that must stay.
        seed: of the token draw and of ``select="random"``.
        say: called with one line on what is being done.
        progress: called with how many of how many (images, blocks) are done of what was said last.
        checkpoint: where moments and the search are saved from time to time, and gone on from.
        max_memory: bytes that moments and hidden states may take above the model; all fit into
            memory where ``None``.
        whole: blocks that nothing may cut.
        multiple: widths that MLPs keep are multiples of it.
    """

    def __init__(
        self,
        setting: Setting,
        recipe: Recipe,
        protected: Iterable[int] = (),
        seed: int = 0,
        say: Say | None = None,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
        max_memory: int | None = None,
        whole: Iterable[int] = (),
        multiple: int | None = None,
    ) -> None:
        self._checkpoint, self._max_memory = checkpoint, max_memory
        self.setting, self.recipe, self.seed = setting, recipe, seed
        self.protected = tuple(sorted({*protected, *whole}))
        self._whole, self._multiple = tuple(sorted(set(whole))), multiple
        self._say, self._progress = say or (lambda line: None), progress
        model, blocks = setting.model, setting.blocks
        check_whole(self._whole, blocks.depth)
        spans_up_to(blocks.depth, 1, self.protected)  # refuses blocks that do not exist
        shelf = None
        if max_memory is not None:
            check_batch(setting.fit.batch_size, setting.state(), blocks.depth, max_memory)
            shelf = Shelf(int(STATES_SHARE * max_memory))
        self._say(f"original model on {len(setting.fit)} fit images")
        self.originals = TracedImages.of(model, blocks, setting.fit, progress=progress, shelf=shelf)
        self._say(f"original model on {len(setting.held_out)} held-out images")
        self.held_out = HeldOut(
            TracedImages.everywhere(model, blocks, setting.held_out, progress, shelf)
        )
        self.sizes = Sizes(model, blocks, setting.example)
        self.precision = narrowest(model)
        self._moments: list[Moments | GroupedMoments] = []
        self._savings: dict[str, list[float]] = {}
        self._search: Search | None = None
        self._cuts: CutSearch | None = None
        self._neurons: dict[str, Neurons] = {}

    def say(self, line: str) -> None:
        """Tell what is being done."""
        self._say(line)

    def with_recipe(self, recipe: Recipe) -> Session:
        """The same calibration under another recipe; nothing of it is saved."""
        other = copy.copy(self)
        other.recipe, other._search, other._cuts, other._checkpoint = recipe, None, None, None
        return other

    @property
    def cuts(self) -> CutSearch:
        """The search over cuts of all kinds; made at the first call."""
        if self._cuts is None:
            model, blocks = self.setting.model, self.setting.blocks
            self._cuts = CutSearch(
                self.originals,
                self.held_out,
                self.sizes,
                self.recipe,
                self.protected,
                self._whole,
                self._calibrate,
                self._multiple,
                self.precision,
                self._say,
                self._progress,
                Stock(model, blocks, source_of(model)).says if self.recipe.uniform else _any,
            )
        return self._cuts

    def narrows(self) -> bool:
        """Whether the recipe may narrow parts of blocks, and the model has some."""
        wanted = set(self.recipe.cuts) & set(PARTS)
        blocks = range(self.setting.blocks.depth) if self.recipe.narrows else ()
        if self.recipe.uniform:
            return self.recipe.narrows and self.cuts.says_uniform()
        return any(wanted & set(self.originals.probe.parts(index).whole) for index in blocks)

    def search(self, longest: int | None = None) -> Search:
        """The search; calibrates at the first call.

        Args:
            longest: spans at least as long must be known; where only one span is allowed, any
                that the model has by default.
        """
        setting, recipe = self.setting, self.recipe
        if setting.blocks.stages:
            self._refuse_stages()
        if longest is None and recipe.contiguous:
            longest = most_removed(setting.blocks.depth, self.protected)
        longest = max(recipe.longest, longest or 0)
        if self._search is None or self._search.recipe.longest < longest:
            spans = spans_up_to(setting.blocks.depth, longest, self.protected)
            if not spans:
                raise BlockfitError("every block is protected; protect fewer")
            if not self._moments or not set(spans) <= set(self._moments[0].spans):
                self._say(f"moments of {len(spans)} spans")
                self._moments[:] = [self._calibrate(spans)]
            moments = self._moments[0]
            self._search = Search(
                self.originals,
                self.held_out,
                moments,
                replace(recipe, longest=longest),
                self.protected,
                self.seed,
                self._say,
                self._progress,
                self.precision,
            )
            self._go_on(self._search)
        return self._search

    def _go_on(self, search: Search) -> None:
        """Take over what an earlier run found, and save what this one finds."""
        checkpoint, name = self._checkpoint, f"search-{search.recipe.longest}"
        if checkpoint is None:
            return
        found = checkpoint.load(name) if ranks.is_first() else None
        search.restore(ranks.agreed(lambda: {} if found is None else found[0]))
        if ranks.is_first():
            search.keep = lambda: checkpoint.save(name, search.state())

    def _calibrate(self, spans: list[Span]) -> Moments | GroupedMoments:
        if self._max_memory is None:
            return self._pass(spans)
        groups = groups_of(spans, self.setting.blocks.width, MOMENTS_SHARE * self._max_memory)
        if len(groups) == 1:
            return self._pass(spans)
        return GroupedMoments(groups, self._passes(groups))

    def _passes(self, groups: list[list[Span]]) -> Iterator[Moments]:
        for number, spans in enumerate(groups):
            self._say(f"moments of {len(spans)} spans, pass {number + 1} of {len(groups)}")
            yield self._pass(spans)

    def _pass(self, spans: list[Span]) -> Moments:
        how = {"tokens_per_image": TOKENS_PER_IMAGE, "seed": self.seed}
        model, blocks, fit = self.setting.model, self.setting.blocks, self.setting.fit
        if self.originals.complete:
            return moments_of(self.originals.kept(), blocks, spans, **how)
        return calibrate(
            model, blocks, fit, spans, **how, progress=self._progress, checkpoint=self._checkpoint
        )

    def by_hand(self, plan: Plan) -> Point:
        """Solve a plan that the user wrote."""
        plan.check(self.setting.blocks.depth, self.protected)
        self._say(f"solving {plan}")
        if plan.narrowings:
            self._check_parts(plan)
            return self.cuts.point(plan)
        options = self.recipe.options
        judge = PlanJudge(self.originals, self.held_out, options, self._progress, self.precision)
        try:
            return judge.point(plan)
        except BlockfitError:
            raise
        except FORWARD_ERRORS as error:
            raise BlockfitError(
                f"the model cannot be run with {plan}: {first_line(error)}; choose other spans"
            ) from error

    def _check_parts(self, plan: Plan) -> None:
        """Refuse a plan whose parts are not those that are found in the model's blocks."""
        for cut in plan.narrowings:
            parts = self.originals.probe.parts(cut.block)
            found = parts.whole.get(cut.part)
            if found is None:
                why = parts.refused.get(cut.part, "it has none")
                raise BlockfitError(
                    f"block {cut.block}: the plan narrows its {cut.part}, which cannot be done in "
                    f"this model: {why}"
                )
            if replace(cut, kept=cut.size) != found:
                raise BlockfitError(
                    f"block {cut.block}: the plan narrows {cut.part} of {_laid_out(cut)}, and the "
                    f"model has {_laid_out(found)}; give the plan of a model of the same "
                    "architecture"
                )

    def reach(self, budget: Budget, judge: Judge | None = None) -> Point:
        """The plan of smallest held-out loss that meets ``budget``.

        Args:
            budget: a size, or the largest loss.
            judge: of a budget of loss.

        Raises:
            BlockfitError: where no plan does; the message says what can be reached.
        """
        self.recipe.check_use(f"{budget.kind}=", protect=self.protected)
        if self.recipe.baseline is not None:
            return self._reach_baseline(budget, self.recipe.baseline)
        if budget.kind == "remove":
            size = int(budget.value)
            longest = size if self.recipe.contiguous else None
            search = self.search(longest)
            point = search.solved(size)
            assert point is not None
            return point
        if self.narrows():
            return self._reach_by_cuts(budget, judge)
        if self.setting.blocks.stages:
            self._refuse_stages()
        if budget.kind in ("params", "flops"):
            return self._reach_size(budget)
        if budget.kind == "latency":
            return self._reach_latency(budget)
        assert judge is not None, "a budget of loss needs a judge"
        return self._reach_loss(judge)

    def _refuse_stages(self) -> NoReturn:
        """Say why nothing can be cut where spans cannot."""
        why = "; ".join(f"{part}: {reason}" for part, reason in self.cuts.refused().items())
        raise BlockfitError(
            "nothing in this model can be cut: its blocks are in stages, of which no span can be "
            f"removed, and nothing in them can be narrowed ({why or 'no kind of cut'})"
        )

    def _reach_by_cuts(self, budget: Budget, judge: Judge | None) -> Point:
        cuts = self.cuts
        if budget.kind in ("params", "flops"):
            self._check_flops(budget)
            share = Share(budget.kind, budget.value)
            cuts.check_reach(share)
            return cuts.best_point(share)
        if budget.kind == "latency":

            def ratio(solution: Solution) -> float:
                return float(ranks.agreed(partial(self.latency_ratio, solution)))

            return cuts.point(cuts.plan_for_latency(budget.value, ratio))
        assert judge is not None, "a budget of loss needs a judge"

        def solve(share: float) -> Solution:
            return cuts.solve(cuts.plan(Share("params", share)))

        def decide(solution: Solution) -> Verdict:
            self._say(f"judging {judge.budget}")
            return judge.verdict(solution)

        smallest = cuts.smallest(Share("params", 1.0))
        found = furthest([share for share in SHARES if share > smallest], solve, decide)
        if found.solved is None:
            what = f"leaving {SHARES[0]:.0%} of the parameters"
            raise judge.refusal(what, found.verdicts[SHARES[0]])
        return cuts.point(found.solved.plan, found.solved)

    def _reach_baseline(self, budget: Budget, method: str) -> Point:
        """A published method on all images, with the figures that it has on the fit images."""
        self._check_flops(budget)
        known = self._neurons
        known.setdefault("fit", Neurons(self.originals))
        known.setdefault("all", Neurons(self.originals.with_more(self.held_out.images)))
        plan = Baseline(known["fit"], method).plan(self.sizes, budget.kind, budget.value)
        solved = []
        for images, neurons in known.items():
            self._say(f"{method} on {'the fit' if images == 'fit' else 'all'} images")
            solution = Baseline(neurons, method).solution(plan)
            solved.append(solution if self.precision is None else solution.rounded(self.precision))
        fidelity, errors, top1 = self.held_out.judge(solved[0])
        return Point(solved[-1], fidelity, tuple(errors), top1)

    def _check_flops(self, budget: Budget) -> None:
        if budget.kind == "flops" and self.sizes.flops is None:
            raise BlockfitError(f"{self.sizes.warnings()[0]}; use remove, params or latency")

    def _reach_size(self, budget: Budget) -> Point:
        self._check_flops(budget)
        largest = most_removed(self.setting.blocks.depth, self.protected)
        sizes = range(1, largest + 1)
        if not any(self._worth_trying(budget, size) for size in sizes):
            raise BlockfitError(
                f"{budget} cannot be reached even with {largest} of "
                f"{self.setting.blocks.depth} blocks removed; ask for more"
            )
        search = self.search()
        smallest = 1.0
        for size in sizes:
            plans = search.proposals(size) if self._worth_trying(budget, size) else []
            for plan in plans:
                smallest = min(smallest, self.sizes.known_fraction(plan, budget.kind))
            if any(self._meets(budget, plan) for plan in plans):
                point = search.solved(size, lambda plan: self._meets(budget, plan))
                assert point is not None
                return point
        raise BlockfitError(
            f"{budget} cannot be reached: with {search.largest} blocks removed, the smallest "
            f"model has {smallest:.1%}; ask for more"
        )

    def _meets(self, budget: Budget, plan: Plan) -> bool:
        return self.sizes.known_fraction(plan, budget.kind) <= budget.value + 1e-9

    def _worth_trying(self, budget: Budget, size: int) -> bool:
        """Whether removing the ``size`` largest blocks for nothing would meet the budget."""
        if budget.kind not in self._savings:
            depth = self.setting.blocks.depth
            single = [Plan.of([f"{i}:{i + 1}"], "identity") for i in range(depth)]
            saved = [1 - self.sizes.known_fraction(plan, budget.kind) for plan in single]
            self._savings[budget.kind] = sorted(saved, reverse=True)
        return 1 - sum(self._savings[budget.kind][:size]) <= budget.value + 1e-9

    def _reach_latency(self, budget: Budget) -> Point:
        search = self.search()
        ratio = 1.0
        for size in range(1, search.largest + 1):
            most = Budget("flops", min(1.0, budget.value * 1.1))
            if self.sizes.flops is not None and not self._worth_trying(most, size):
                continue
            point = search.solved(size)
            assert point is not None
            ratio = ranks.agreed(partial(self.latency_ratio, point.solution))
            self._say(f"{size} blocks: latency {ratio:.1%} of the original's")
            if ratio <= budget.value:
                return point
        raise BlockfitError(
            f"{budget} cannot be reached on this machine: with {search.largest} blocks removed, "
            f"the latency is {ratio:.1%} of the original's; ask for more"
        )

    def latency_ratio(self, solution: Solution) -> float:
        """Median latency of the solved model over the original's, measured in turn."""
        setting = self.setting
        return latency_of(setting.model, setting.blocks, solution, setting.example).ratio

    def _reach_loss(self, judge: Judge) -> Point:
        search = self.search()

        def solve(size: int) -> Point:
            point = search.solved(size)
            assert point is not None
            return point

        def decide(point: Point) -> Verdict:
            self._say(f"{point.removed} blocks: judging {judge.budget}")
            return judge.verdict(point.solution)

        found = furthest(range(1, search.largest + 1), solve, decide)
        if found.solved is None:
            raise judge.refusal("removing one block", found.verdicts[1])
        return found.solved

    def repaired_blocks(self, point: Point) -> list[int]:
        """The kept blocks of which a solution holds weights that were solved again."""
        blocks = self.setting.blocks
        names = named_blocks(self.setting.model, blocks)
        starts = [".".join(filter(None, (blocks.path, name))) + "." for name in names]
        changed = point.solution.weights
        return [i for i, start in enumerate(starts) if any(n.startswith(start) for n in changed)]

    def _cut_words(self, point: Point) -> str:
        """What a plan does, for warnings."""
        if not point.solution.plan.narrowings:
            return f"removing {point.removed} block{'' if point.removed == 1 else 's'}"
        left = self.sizes.known_fraction(point.solution.plan, "params")
        return f"leaving {left:.0%} of the parameters"

    def warnings(self, point: Point) -> list[str]:
        """What the user should know: images that change, a costly budget, the nearest safe one."""
        loss, search = point.fidelity.loss, self._search
        out = [*self.setting.warnings, *self.sizes.warnings()]
        out += [] if search is None else search.warnings()
        out += [] if self._cuts is None else self._cuts.warnings()
        if why := self.held_out.original[0].no_head:
            out.append(
                f"no head is recognised ({why}), so plans are judged by features; KL, agreement "
                "and top-1 are missing"
            )
        if loss > SAFE_LOSS:
            what = "KL" if point.fidelity.kl is not None else "relative feature error"
            line = (
                f"{self._cut_words(point)} costs a held-out {what} of {loss:.3f}, above {SAFE_LOSS}"
            )
            tried = (
                {} if search is None else {n: search.tried[p[0]] for n, p in search.best.items()}
            )
            safe = [n for n, value in tried.items() if value <= SAFE_LOSS]
            if safe:
                line += f"; the nearest safe budget is remove={max(safe)}"
            elif tried:
                line += "; no number of blocks is safe for this model and these images"
            out.append(line)
        for error in point.map_errors:
            if error.map == "identity" and any(m != "identity" for m in self.recipe.maps):
                out.append(f"span {error.span} was dropped: its map was worse than identity")
        tokens = self.originals.tokens
        if tokens < 4 * self.setting.blocks.width:
            out.append(
                f"{tokens} tokens of {len(self.setting.fit)} images are few for width "
                f"{self.setting.blocks.width}; more calibration images give a better model"
            )
        return out
