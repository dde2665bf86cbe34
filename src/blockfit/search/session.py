"""One calibration and everything that is answered from it, for compress and sweep."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace

from blockfit import processes as ranks
from blockfit.checkpoint import Checkpoint
from blockfit.errors import BlockfitError, first_line
from blockfit.fit.moments import Moments
from blockfit.fit.plan import PARTS, Narrowing, Plan, Span, spans_up_to
from blockfit.models.blocks import block_paths
from blockfit.models.forward import FORWARD_ERRORS
from blockfit.models.load import source_of
from blockfit.models.stock import Stock
from blockfit.models.tensors import narrowest
from blockfit.progress import Progress, Say, silent
from blockfit.search.baselines import Baseline, Neurons
from blockfit.search.budget import Budget, Sizes
from blockfit.search.calibrate import TOKENS_PER_IMAGE, calibrate, moments_of
from blockfit.search.cuts import CutSearch
from blockfit.search.fidelity import Fidelity
from blockfit.search.held_out import HeldOut
from blockfit.search.latency import latency_of
from blockfit.search.plan_judge import PlanJudge, Point
from blockfit.search.recipes import Recipe
from blockfit.search.setting import Setting, check_whole, views_of
from blockfit.search.solve import Solution
from blockfit.search.span_search import Search, most_removed
from blockfit.search.spill import (
    MOMENTS_SHARE,
    STATES_SHARE,
    GroupedMoments,
    Shelf,
    check_batch,
    groups_of,
)
from blockfit.search.states import TracedImages

SAFE_LOSS = 0.1
"""Held-out loss above which a warning is due: KL in nats, relative feature error without a head."""


def _laid_out(part: Narrowing) -> str:
    layers = ", ".join(f"{rows.layer} from row {rows.start}" for rows in part.rows)
    return f"{part.heads} × {part.size} in {layers}"


def _shown(views: int) -> str:
    return "" if views == 1 else f", {views} views of each"


class Session:
    """Calibrates once; then finds plans for any number of budgets.

    Args:
        seed: of the token draw and of ``select="random"``.
        checkpoint: where moments and the search are saved from time to time, and gone on from.
        max_memory: bytes that moments and hidden states may take above the model; all fit into
            memory where ``None``.
    """

    def __init__(
        self,
        setting: Setting,
        recipe: Recipe,
        protected: Iterable[int] = (),
        seed: int = 0,
        say: Say = silent,
        progress: Progress = silent,
        checkpoint: Checkpoint | None = None,
        max_memory: int | None = None,
        whole: Iterable[int] = (),
        multiple: int | None = None,
    ) -> None:
        self._checkpoint, self._max_memory = checkpoint, max_memory
        self.setting, self.recipe, self.seed = setting, recipe, seed
        self.protected = tuple(sorted({*protected, *whole}))
        self._whole, self._multiple = tuple(sorted(set(whole))), multiple
        self.say, self._progress = say, progress
        model, blocks = setting.model, setting.blocks
        check_whole(self._whole, blocks.depth)
        spans_up_to(blocks.depth, 1, self.protected)  # refuses blocks that do not exist
        shelf = None
        if max_memory is not None:
            check_batch(setting.fit.batch_size, setting.state(), blocks.depth, max_memory)
            shelf = Shelf(int(STATES_SHARE * max_memory))
        self.views, self._wider = views_of(recipe, setting)
        fit = replace(setting.fit, views=self.views)
        held_out = replace(setting.held_out, views=max(self.views, self._wider))
        self.say(f"original model on {len(fit)} fit images{_shown(fit.views)}")
        self.originals = TracedImages.of(model, blocks, fit, progress=progress, shelf=shelf)
        self.say(f"original model on {len(held_out)} held-out images{_shown(held_out.views)}")
        traced = TracedImages.everywhere(model, blocks, held_out, progress, shelf)
        self.held_out = HeldOut(traced, self.views, self._wider)
        self.sizes = Sizes(model, blocks, setting.example)
        self.precision = narrowest(model)
        self._moments: list[Moments | GroupedMoments] = []
        self._search: Search | None = None
        self._cuts: CutSearch | None = None
        self._neurons: dict[str, Neurons] = {}

    def with_recipe(self, recipe: Recipe) -> Session:
        """The same calibration under another recipe; nothing of it is saved.

        Raises:
            BlockfitError: where the recipe asks for more views of the images than were taken.
        """
        other, (views, wider) = copy.copy(self), views_of(recipe, self.setting)
        other.recipe, other._search, other._cuts, other._checkpoint = recipe, None, None, None
        if recipe.views is None:
            views, wider = min(views, self.views), min(wider, self._wider)
        elif views > self.views:
            raise BlockfitError(
                f"the recipe asks for {views} views of every image, and the calibration has "
                f"{self.views}; make another one with views={views}"
            )
        if (views, wider) != (self.views, self._wider):
            other.views, other._wider = views, wider
            other._moments, other._neurons = [], {}
            other.originals = self.originals.shown(views)
            other.held_out = self.held_out.seen(views, wider)
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
                self.say,
                self._progress,
                Stock(model, blocks, source_of(model)).says if self.recipe.uniform else None,
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
        self.check_chain()
        if longest is None and recipe.contiguous:
            longest = most_removed(setting.blocks.depth, self.protected)
        longest = max(recipe.longest, longest or 0)
        if self._search is None or self._search.recipe.longest < longest:
            spans = spans_up_to(setting.blocks.depth, longest, self.protected)
            if not spans:
                raise BlockfitError("every block is protected; protect fewer")
            if not self._moments or not set(spans) <= set(self._moments[0].spans):
                self.say(f"moments of {len(spans)} spans")
                self._moments[:] = [self._calibrate(spans)]
            moments = self._moments[0]
            self._search = Search(
                self.originals,
                self.held_out,
                moments,
                replace(recipe, longest=longest),
                self.protected,
                self.seed,
                self.say,
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
            self.say(f"moments of {len(spans)} spans, pass {number + 1} of {len(groups)}")
            yield self._pass(spans)

    def _pass(self, spans: list[Span]) -> Moments:
        how = {"tokens_per_image": TOKENS_PER_IMAGE, "seed": self.seed}
        model, blocks = self.setting.model, self.setting.blocks
        fit = replace(self.setting.fit, views=self.views)
        if self.originals.complete:
            return moments_of(self.originals.kept(), blocks, spans, **how)
        return calibrate(
            model, blocks, fit, spans, **how, progress=self._progress, checkpoint=self._checkpoint
        )

    def by_hand(self, plan: Plan) -> Point:
        """Solve a plan that the user wrote."""
        plan.check(self.setting.blocks.depth, self.protected)
        self.say(f"solving {plan}")
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

    def check_chain(self) -> None:
        """Refuse blocks in stages, of which no span can go: say why nothing else can be cut."""
        if not self.setting.blocks.stages:
            return
        why = "; ".join(f"{part}: {reason}" for part, reason in self.cuts.refused().items())
        raise BlockfitError(
            "nothing in this model can be cut: its blocks are in stages, of which no span can be "
            f"removed, and nothing in them can be narrowed ({why or 'no kind of cut'})"
        )

    def published(self, budget: Budget, method: str) -> Point:
        """A published method on all images, with the figures that it has on the fit images."""
        known = self._neurons
        known.setdefault("fit", Neurons(self.originals))
        known.setdefault("all", Neurons(self.originals.with_more(self.held_out.views)))
        plan = Baseline(known["fit"], method).plan(self.sizes, budget.kind, budget.value)
        solved = []
        for images, neurons in known.items():
            self.say(f"{method} on {'the fit' if images == 'fit' else 'all'} images")
            solution = Baseline(neurons, method).solution(plan)
            if self.precision is not None:
                solution = solution.rounded(self.precision, self.originals.hold)
            solved.append(solution)
        fidelity, errors, top1 = self.held_out.judge(solved[0])
        return Point(solved[-1], fidelity, tuple(errors), top1)

    def fitted(self, solution: Solution) -> Fidelity | None:
        """Fidelity on as many of the images that are fitted on as are held out, as they are.

        What it is better there than on other images, more images would narrow. ``None`` where the
        hidden states of these images are not kept.
        """
        once = self.originals.shown(1)
        some = once.after(once.part(0), len(self.held_out))
        return HeldOut(some).score(solution) if some.sizes else None

    def latency_ratio(self, solution: Solution) -> float:
        """Median latency of the solved model over the original's, measured in turn."""
        setting = self.setting
        return latency_of(setting.model, setting.blocks, solution, setting.example).ratio

    def repaired_blocks(self, point: Point) -> list[int]:
        """The kept blocks of which a solution holds weights that were solved again."""
        starts = [f"{path}." for path in block_paths(self.setting.model, self.setting.blocks)]
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
        tokens = self.originals.shown(1).tokens
        if tokens < 4 * self.setting.blocks.width:
            out.append(
                f"{tokens} tokens of {len(self.setting.fit)} images are few for width "
                f"{self.setting.blocks.width}; more calibration images give a better model"
            )
        return out
