"""Solving a plan block by block: maps refitted on the compressed prefix, kept blocks repaired.

Everything is closed-form: no gradients, no labels, no added parameters beyond the maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.arguments import check_fields
from blockfit.errors import BlockfitError
from blockfit.fit.closed_form import RIDGE, choose_ridge, fit_affine, fit_map
from blockfit.fit.maps import empty_map
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Plan, Replacement
from blockfit.models.blocks import Blocks, named_blocks
from blockfit.models.forward import evaluating
from blockfit.models.residual import Writer, input_of, inputs_of, left_out, need_writer, written
from blockfit.models.surgery import apply_plan, swapped
from blockfit.search.prefixes import Beginnings
from blockfit.search.states import Originals
from blockfit.search.tokens import Draw, RowSums

REPAIRS = ("none", "mlp", "mlp+attention")

REPAIR_RIDGE = 3.0
"""Default λ of the repairs, towards the original weights; measured in docs/measurements.md."""

CHECK_EVERY = 5
"""One batch in this many judges the ridge of a map where that is chosen."""


@dataclass(frozen=True)
class Options:
    """How maps and repairs are solved.

    Args:
        ridge: λ of the maps, relative to the mean diagonal, towards the identity; ``None`` chooses
            it for each map, by its error on every fifth batch of the fit images.
        prefix_weight: weight of a prefix token in every fit, where a patch token weighs 1.
        refit: fit each map on what the compressed prefix really feeds it.
        repair: which output weights of kept blocks behind the first span are solved anew.
        repair_ridge: λ of the repairs, towards the original weights.

    Raises:
        BlockfitError: for a negative λ or weight, or an unknown repair.
    """

    ridge: float | None = RIDGE
    prefix_weight: float = 1.0
    refit: bool = True
    repair: str = "mlp+attention"
    repair_ridge: float = REPAIR_RIDGE

    def __post_init__(self) -> None:
        check_fields(self)
        if self.repair not in REPAIRS:
            raise BlockfitError(
                f"unknown repair {self.repair!r}; choose one of {', '.join(REPAIRS)}"
            )
        for name in ("ridge", "repair_ridge"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise BlockfitError(f"{name} must be 0 or more, got {value}")
        if not 0 < self.prefix_weight < float("inf"):
            raise BlockfitError(f"prefix_weight must be above 0, got {self.prefix_weight}")


@dataclass(frozen=True)
class Solution:
    """A plan with everything that was solved for it.

    Args:
        plan: what goes.
        maps: one float32 module per replacement, in the plan's order.
        weights: parameters of kept blocks that were solved anew, by their names in the model.
    """

    plan: Plan
    maps: tuple[nn.Module, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def rounded(self, dtype: torch.dtype) -> Solution:
        """The same with every solved value rounded to one that ``dtype`` can hold.

        A checkpoint that is stored in half precision then stays one: the file of the small model
        is smaller by what the plan says, and loads to the same values bit for bit.
        """

        def narrow(value: Tensor) -> Tensor:
            return value.to(dtype).to(value.dtype)

        maps = copy.deepcopy(self.maps)
        with torch.no_grad():
            for parameter in (p for module in maps for p in module.parameters()):
                parameter.copy_(narrow(parameter))
        weights = {name: narrow(value) for name, value in self.weights.items()}
        return Solution(self.plan, maps, weights)

    def apply(self, model: nn.Module, blocks: Blocks) -> None:
        """Put it into ``model``, in place; refused before anything is changed if it does not fit.

        Raises:
            BlockfitError: where plan, maps or weights do not fit the model.
        """
        known = dict(model.named_parameters(remove_duplicate=False))
        for name, value in self.weights.items():
            if name not in known or known[name].shape != value.shape:
                raise BlockfitError(f"the model has no parameter {name!r} of the repaired shape")
        apply_plan(model, blocks, self.plan, self.maps)
        for name, value in self.weights.items():
            known[name].data = value.to(known[name]).clone()


def solve(
    originals: Originals,
    plan: Plan,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
    beginnings: Beginnings | None = None,
) -> Solution:
    """Fit a plan's maps one after the other and repair the kept blocks behind the first span.

    Each map and each repair is solved on what the compressed part before it produces, towards
    the original's hidden states, so that errors are corrected instead of passed on. Every fit
    uses all tokens of all images of ``originals``. In a run on several processes each walks its
    own batches; the sums are added up, and all return the same.

    Args:
        originals: the fit images as the original saw them.
        plan: what goes.
        options: how to solve; defaults to ``Options()``.
        progress: called with (blocks done, blocks in all).
        beginnings: of plans refitted with the same originals and options; unused in repairs.
    """
    plan.check(originals.blocks.depth)
    with evaluating(originals.model), torch.no_grad():
        solution = _Walk(originals, plan, options or Options(), beginnings).solution(progress)
        # Equal sums give equal solutions, but machines of a run may round differently.
        ranks.share(p for module in solution.maps for p in module.parameters())
        ranks.share(solution.weights.values())
        return solution


class _Walk:
    """One walk through the blocks; ``hidden[b]`` is batch b's compressed state at ``at``."""

    def __init__(
        self,
        originals: Originals,
        plan: Plan,
        options: Options,
        beginnings: Beginnings | None = None,
    ) -> None:
        self.originals, self.plan, self.options = originals, plan, options
        self.beginnings = beginnings if options.repair == "none" else None
        self.blocks, self.hold = originals.blocks, originals.hold
        self.by_start = {entry.span.start: entry for entry in plan}
        self.names = list(named_blocks(originals.model, originals.blocks))
        self.maps: dict[Replacement, nn.Module] = {}
        self.weights: dict[str, Tensor] = {}
        self.hidden: list[Tensor] | None = None

    def solution(self, progress: Callable[[int, int], None] | None) -> Solution:
        if not len(self.plan):
            return Solution(self.plan, ())
        first = min(e.span.start - (e.map == "folded") for e in self.plan)
        last = max(e.span.stop for e in self.plan)
        end = self.blocks.depth if self.options.repair != "none" else last
        index = self._begin(first)
        while index < end:
            entry = self.by_start.get(index)
            if entry is None:
                self._keep(index, repair=index >= self.plan.spans[0].start)
                index += 1
            else:
                self._replace(entry)
                index = entry.span.stop
            if progress is not None:
                progress(index - first, end - first)
        return Solution(self.plan, tuple(self.maps[e] for e in self.plan), self.weights)

    def _begin(self, first: int) -> int:
        """Go on behind what another plan has in common with this one, or at block ``first``."""
        found = self.beginnings and self.beginnings.longest(self.plan)
        if not found:
            self.hidden = self._targets(first)
            return first
        entries, known = found
        self.maps, self.hidden = dict(known.maps), known.hidden
        return entries[-1].span.stop

    def _targets(self, boundary: int) -> list[Tensor]:
        """The original's states, batch by batch."""
        return [self.originals.state(b, boundary) for b in range(len(self.originals.traces))]

    def _replace(self, entry: Replacement) -> None:
        assert self.hidden is not None
        span = entry.span
        if entry.map in ("identity", "folded"):
            self.maps[entry] = empty_map(entry, self.blocks.width)
            return
        options = self.options
        parts = [Moments([span], self.blocks.width, self.blocks.prefix_tokens) for _ in range(2)]
        for b, hidden in enumerate(self.hidden):
            source = hidden if options.refit else self.originals.state(b, span.start)
            target = self.originals.state(b, span.stop)
            judges = self.originals.numbers[b] % CHECK_EVERY == 1
            parts[judges].add({span.start: source, span.stop: target})
        for part in parts:
            part.reduce()
        moments, check = parts
        ridge = RIDGE if options.ridge is None else options.ridge
        if options.ridge is None and any(check.tokens.values()):
            ridge = choose_ridge(entry, moments, check, options.prefix_weight)
        moments.merge(check)
        fitted = fit_map(entry, moments, ridge, options.prefix_weight)
        self.maps[entry] = fitted
        on_device = copy.deepcopy(fitted).to(self.originals.like)
        self.hidden = [self.hold(on_device(hidden)) for hidden in self.hidden]
        if self.beginnings is not None:
            self.beginnings.keep(tuple(self.maps), self.maps, self.hidden)

    def _keep(self, index: int, repair: bool) -> None:
        """Pass a kept block, folding the span behind it into it and repairing it where asked."""
        assert self.hidden is not None
        behind = self.by_start.get(index + 1)
        folded = behind if behind is not None and behind.map == "folded" else None
        what = self.options.repair if repair else "none"
        writers = self.originals.writers(index) if what != "none" or folded else []
        block = self.originals.modules[index]
        if folded:
            need_writer(writers, index, f"the folded map of span {folded.span}")
        solved: dict[str, Tensor] = {}
        middles = None
        if what == "mlp+attention" and len(writers) == 2:
            solved, middles = self._repair_attention(index, writers)
        solve_mlp = bool(writers) and (folded is not None or what != "none")
        targets: list[Tensor] = []
        if solve_mlp:
            # Before the weights are swapped: the targets may have to be computed again.
            boundary = folded.span.stop if folded else index + 1
            targets = self._targets(boundary)
        with swapped(block, solved):
            if solve_mlp:
                solved |= self._solve_mlp(
                    index, writers[-1], targets, folded, what != "none", middles
                )
            else:
                self.hidden = [
                    seen.run(block, index, hidden)
                    for seen, hidden in zip(self.originals.traces, self.hidden, strict=True)
                ]
        prefix = ".".join(filter(None, (self.blocks.path, self.names[index])))
        self.weights.update({f"{prefix}.{name}": value for name, value in solved.items()})

    def _repair_attention(
        self, index: int, writers: list[Writer]
    ) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        """Solve the attention's output weights towards the original's state before the MLP.

        Returns the weights, and the states before the MLP's contribution that they give, where
        these follow without running the block again.
        """
        assert self.hidden is not None
        block, attention, mlp = self.originals.modules[index], writers[0], writers[-1]
        silent = {attention.name: 0.0, mlp.name: 0.0}
        bare = self.originals.bare(index)
        draw = self._draw(attention.linear(block).in_features)
        sums, read = self._repair_sums(attention.linear(block), draw), []
        for b, (seen, hidden) in enumerate(zip(self.originals.traces, self.hidden, strict=True)):
            run = seen.runner(block, index)
            read.append(self.hold(input_of(block, attention.name, run, hidden)))
            base = hidden
            if not bare:
                with written(block, silent):
                    base = run(hidden)
            places = self.originals.places(b)
            gap = self.originals.middle(b, index, draw) - draw.take(base, places)
            sums.add(draw.take(read[-1], places), gap)
        solved = self._solved(block, attention, sums, attention.effective(block))
        if not bare:
            return solved, None
        with swapped(block, solved):
            return solved, [
                self.hold(hidden + attention.contribution(block, x))
                for hidden, x in zip(self.hidden, read, strict=True)
            ]

    def _solve_mlp(
        self,
        index: int,
        mlp: Writer,
        targets: list[Tensor],
        folded: Replacement | None,
        repair: bool,
        middles: list[Tensor] | None,
    ) -> dict[str, Tensor]:
        """Solve the MLP's output weights so that the block's output meets the targets.

        ``middles`` are the states before the MLP's contribution, where they are known already.
        """
        assert self.hidden is not None
        block = self.originals.modules[index]
        weight, bias = mlp.effective(block)
        bases, regressors = [], []
        for b, (seen, hidden) in enumerate(zip(self.originals.traces, self.hidden, strict=True)):
            if middles is None:
                with inputs_of(block, mlp.name) as inputs, written(block, {mlp.name: 0.0}):
                    bases.append(self.hold(seen.run(block, index, hidden)))
                regressors.append(self.hold(inputs[0]))
            else:
                bases.append(middles[b])
                run, skip = seen.runner(block, index), self.originals.skip(index)
                given = hidden if skip is None else middles[b]
                with left_out(block, skip):
                    regressors.append(self.hold(input_of(block, mlp.name, run, given)))
        prior = (weight, bias)
        if folded:
            prior = self._fold(targets, weight, bias, bases, regressors)
        if repair:
            draw = self._draw(weight.shape[1])
            sums = self._repair_sums(mlp.linear(block), draw)
            for b, (base, x) in enumerate(zip(bases, regressors, strict=True)):
                places = self.originals.places(b)
                gap = draw.take(targets[b], places) - draw.take(base, places)
                sums.add(draw.take(x, places), gap)
            solved = self._solved(block, mlp, sums, prior)
        else:
            solved = mlp.stored(block, *prior)
        with swapped(block, solved):
            self.hidden = [
                self.hold(base + mlp.contribution(block, x))
                for base, x in zip(bases, regressors, strict=True)
            ]
        return solved

    def _fold(
        self,
        targets: list[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        bases: list[Tensor],
        regressors: list[Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """``A`` and ``b`` of a folded map, multiplied into the effective weight and bias.

        ``r + A m + b`` approximates the targets, with r the state before the MLP's contribution m
        (ReplaceMe, arXiv 2505.02819, maps the MLP's output in the same place).
        """
        whole = Draw.all(self.blocks.prefix_tokens, self.originals.like.shape[1])
        weights = whole.weights(self.options.prefix_weight)
        sums = RowSums(weight.shape[0], weight.shape[0], weights, torch.float64)
        for b, (base, x) in enumerate(zip(bases, regressors, strict=True)):
            contribution = nn.functional.linear(
                x, weight.to(x), None if bias is None else bias.to(x)
            )
            sums.add(contribution, targets[b] - base)
        ridge = RIDGE if self.options.ridge is None else self.options.ridge
        fitted = fit_affine(sums.total(), ridge, bias=bias is not None)
        if bias is not None:
            bias = fitted.weight @ bias + fitted.bias
        return fitted.weight @ weight, bias

    def _draw(self, inputs: int) -> Draw:
        images, tokens = sum(self.originals.sizes.values()), self.originals.like.shape[1]
        return Draw.limited(self.blocks.prefix_tokens, tokens, images, inputs)

    def _repair_sums(self, linear: nn.Linear, draw: Draw) -> RowSums:
        weights = draw.weights(self.options.prefix_weight)
        enough = torch.float32 if self.options.repair_ridge >= 1e-3 else torch.float64
        return RowSums(linear.in_features, linear.out_features, weights, enough)

    def _solved(
        self,
        block: nn.Module,
        writer: Writer,
        sums: RowSums,
        prior: tuple[Tensor, Tensor | None],
    ) -> dict[str, Tensor]:
        weight, bias = prior
        ridge, problem = self.options.repair_ridge, sums.total()
        fitted = fit_affine(problem, ridge, prior=weight, bias=bias is not None)
        return writer.stored(block, fitted.weight, fitted.bias)
