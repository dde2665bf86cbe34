"""Solving a plan block by block: maps refitted on the compressed prefix, kept blocks repaired.

Everything is closed-form: no gradients, no labels, no added parameters beyond the maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.arguments import check_fields, one_of
from blockfit.errors import BlockfitError
from blockfit.fit.closed_form import RIDGE, choose_ridge, fit_affine, fit_map
from blockfit.fit.maps import empty_map
from blockfit.fit.moments import Moments, Regression, Spread
from blockfit.fit.narrow import Basis, Kept
from blockfit.fit.plan import Narrowing, Plan, Replacement
from blockfit.models.blocks import Blocks, block_paths
from blockfit.models.forward import evaluating
from blockfit.models.narrowed import narrowed, narrowed_block
from blockfit.models.padding import real_rows
from blockfit.models.residual import (
    Writer,
    input_of,
    inputs_of,
    left_out,
    need_writer,
    outputs_of,
    written,
)
from blockfit.models.stages import crossed
from blockfit.models.surgery import apply_plan, swapped
from blockfit.progress import Progress, silent
from blockfit.search.narrowing import (
    Layers,
    Rewritten,
    centred,
    key_bases,
    narrowed_values,
    neurons_removed,
    of_some,
    put_keys,
    put_neurons,
    put_values,
    value_bases,
    values_prior,
)
from blockfit.search.prefixes import Beginnings
from blockfit.search.states import TracedImages
from blockfit.search.tokens import NARROW_ROWS_PER_INPUT, Draw, RowSums

REPAIRS = ("none", "mlp", "mlp+attention")

REPAIR_RIDGE = 3.0
"""Default λ of the repairs, towards the original weights; measured in docs/measurements.md."""

NARROW_RIDGE = 0.3
"""Default λ of the output weights of narrowed parts; measured in docs/measurements.md."""

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
        repair: which output weights of kept blocks after the first span are solved again.
        repair_ridge: λ of the repairs, towards the original weights.
        narrow_ridge: λ of the output weights of narrowed parts, towards those that make up for
            what went.

    Raises:
        BlockfitError: for a negative λ or weight, or an unknown repair.
    """

    ridge: float | None = RIDGE
    prefix_weight: float = 1.0
    refit: bool = True
    repair: str = "mlp+attention"
    repair_ridge: float = REPAIR_RIDGE
    narrow_ridge: float = NARROW_RIDGE

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("repair", self.repair, REPAIRS)
        for name in ("ridge", "repair_ridge", "narrow_ridge"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise BlockfitError(f"{name} must be 0 or more, got {value}")
        if not 0 < self.prefix_weight < float("inf"):
            raise BlockfitError(f"prefix_weight must be above 0, got {self.prefix_weight}")


@dataclass(frozen=True)
class Solution:
    """A plan with everything that was solved for it.

    Args:
        maps: one float32 module per replacement, in the plan's order.
        weights: parameters of kept blocks that were solved again, by their names in the model;
            those of narrowed parts have their smaller shapes.
    """

    plan: Plan
    maps: tuple[nn.Module, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def rounded(
        self, dtype: torch.dtype, hold: Callable[[Tensor], Tensor] | None = None
    ) -> Solution:
        """The same with every solved value rounded to one that ``dtype`` can hold.

        A checkpoint that is stored in half precision then stays one: the file of the small model
        is smaller by what the plan says, and loads to the same values bit for bit.

        Args:
            hold: gives the tensor back, or a copy of it that takes no memory of its own.
        """

        def narrow(value: Tensor) -> Tensor:
            return value.to(dtype).to(value.dtype)

        maps = copy.deepcopy(self.maps)
        with torch.no_grad():
            for parameter in (p for module in maps for p in module.parameters()):
                parameter.copy_(narrow(parameter))
        kept = hold or (lambda value: value)
        weights = {name: kept(narrow(value)) for name, value in self.weights.items()}
        return Solution(self.plan, maps, weights)

    def apply(self, model: nn.Module, blocks: Blocks) -> None:
        """Put it into ``model``, in place; refused before anything is changed if it does not fit.

        Raises:
            BlockfitError: where plan, maps or weights do not fit the model.
        """
        with narrowed(model, blocks, self.plan.narrowings, self.weights):
            known = dict(model.named_parameters(remove_duplicate=False))
            for name, value in self.weights.items():
                if name not in known or known[name].shape != value.shape:
                    raise BlockfitError(f"the model has no parameter {name!r} of the solved shape")
        apply_plan(model, blocks, self.plan, self.maps, self.weights)
        known = dict(model.named_parameters(remove_duplicate=False))
        for name, value in self.weights.items():
            known[name].data = value.to(known[name]).clone()

    def built(self, model: nn.Module, blocks: Blocks, own: bool = True) -> nn.Module:
        """A copy of ``model`` with the solution in it; what goes is not copied first.

        Args:
            own: copy the parameters that stay as they are too. Without it they are the model's:
                for a copy that is looked at and never written to.

        Raises:
            BlockfitError: where plan, maps or weights do not fit the model.
        """
        plain = [value for value in model.parameters() if type(value) is nn.Parameter]
        memo = {id(v): nn.Parameter(v.detach(), requires_grad=v.requires_grad) for v in plain}
        small = copy.deepcopy(model, {**memo})
        self.apply(small, blocks)
        theirs = {value.data_ptr() for value in plain} if own else set()
        for value in small.parameters():
            if type(value) is nn.Parameter and value.data_ptr() in theirs:
                value.data = value.data.clone()
        return small


def solve(
    originals: TracedImages,
    plan: Plan,
    options: Options | None = None,
    progress: Progress = silent,
    beginnings: Beginnings | None = None,
    choices: Choices | None = None,
) -> Solution:
    """Fit a plan's maps one after the other and repair the kept blocks after the first span.

    Each map and each repair is solved on what the compressed part before it produces, towards
    the original's hidden states, so that errors are corrected instead of passed on. Every fit
    uses all tokens of all images of ``originals``. In a run on several processes each walks its
    own batches; the sums are added up, and all return the same.

    Args:
        originals: the fit images as the original saw them.
        beginnings: of plans refitted with the same originals and options; unused in repairs.
        choices: of narrowed parts: taken from here where they are known, and put here where not.
    """
    plan.check(originals.blocks.depth)
    with evaluating(originals.model), torch.no_grad():
        walk = _Walk(originals, plan, options or Options(), beginnings, choices)
        solution = walk.solution(progress)
        # Equal sums give equal solutions, but machines of a run may round differently.
        ranks.share(p for module in solution.maps for p in module.parameters())
        ranks.share(solution.weights.values())
        return solution


@dataclass
class Choices:
    """What stays of the narrowed parts of a plan, by block.

    It hardly depends on which images are drawn, so that a second solution of the same plan, without
    the images that judge it, takes it over from the first and solves only what stays: a third of
    the work. Its error on those images comes out a few percent low (docs/measurements.md).

    Args:
        neurons: of MLPs, with the rows by which they make up for the others.
        values: bases of every head.
        keys: bases of every head.
    """

    neurons: dict[int, Kept] = field(default_factory=dict)
    values: dict[int, list[Basis]] = field(default_factory=dict)
    keys: dict[int, list[Basis]] = field(default_factory=dict)


class _Walk:
    """One walk through the blocks; ``hidden[b]`` is batch b's compressed state at ``at``."""

    def __init__(
        self,
        originals: TracedImages,
        plan: Plan,
        options: Options,
        beginnings: Beginnings | None = None,
        choices: Choices | None = None,
    ) -> None:
        self.originals, self.plan, self.options = originals, plan, options
        self.choices = Choices() if choices is None else choices
        self.beginnings = beginnings if options.repair == "none" else None
        self.blocks, self.hold = originals.blocks, originals.hold
        self.by_start = {entry.span.start: entry for entry in plan}
        self.paths = block_paths(originals.model, originals.blocks)
        self.maps: dict[Replacement, nn.Module] = {}
        self.weights: dict[str, Tensor] = {}
        self.hidden: list[Tensor] | None = None
        self.ends: dict[int, list[Tensor]] = {}
        """What the last blocks of the stages so far return, batch by batch."""

    def solution(self, progress: Progress) -> Solution:
        if not self.plan:
            return Solution(self.plan, ())
        cut = [cut.block for cut in self.plan.narrowings]
        first = min([e.span.start - (e.map == "folded") for e in self.plan] + cut)
        last = max([e.span.stop for e in self.plan] + [block + 1 for block in cut])
        end = self.blocks.depth if self.options.repair != "none" else last
        changes = min([span.start for span in self.plan.spans] + cut)
        index = self._begin(first)
        while index < end:
            entry = self.by_start.get(index)
            if entry is None:
                self._keep(index, repair=index >= changes)
                index += 1
            else:
                self._replace(entry)
                index = entry.span.stop
            self.originals.tidy()
            progress(index - first, end - first)
        return Solution(self.plan, tuple(self.maps[e] for e in self.plan), self.weights)

    def _begin(self, first: int) -> int:
        """Go on after the longest cached prefix of the plan, or at block ``first``."""
        found = self.beginnings and self.beginnings.longest(self.plan)
        if not found:
            for end in (end for end in self.blocks.ends if end < first):
                batches = range(len(self.originals.traces))
                self.ends[end] = [self.originals.returned(b, end) for b in batches]
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
            judges = self.originals.checks(b, CHECK_EVERY)
            states, real = {span.start: source, span.stop: target}, self.originals.traces[b].real
            if real is None:
                parts[judges].add(states)
            else:
                patches = int(real[:, self.blocks.prefix_tokens :].sum())
                parts[judges].add_some(states, real, patches)
        for part in parts:
            part.reduce()
        moments, check = parts
        ridge = RIDGE if options.ridge is None else options.ridge
        if options.ridge is None and any(check.tokens.values()):
            ridge = choose_ridge(entry, moments, check, options.prefix_weight)
        moments.merge(check)
        fitted = fit_map(entry, moments, ridge, options.prefix_weight)
        self.maps[entry] = fitted
        on_device = copy.deepcopy(fitted).to(self.originals.probe.state)
        self.hidden = [self.hold(on_device(hidden)) for hidden in self.hidden]
        if self.beginnings is not None:
            self.beginnings.keep(tuple(self.maps), self.maps, self.hidden)

    def _keep(self, index: int, repair: bool) -> None:
        """Pass a kept block, folding the span after it into it and repairing it where asked."""
        assert self.hidden is not None
        after = self.by_start.get(index + 1)
        folded = after if after is not None and after.map == "folded" else None
        what = self.options.repair if repair else "none"
        writers = self.originals.probe.writers(index) if what != "none" or folded else []
        block, cuts = self.originals.modules[index], self.plan.at(index)
        if cuts:
            writers, what = self.originals.probe.writers(index), "mlp+attention"
            self.originals.probe.skip(
                index
            )  # found on the block as it is, before anything is swapped
        if folded:
            need_writer(writers, index, f"the folded map of span {folded.span}")
        middles, rewritten = None, Rewritten(block)
        if "keys" in cuts:
            self._narrow_keys(index, cuts["keys"], rewritten)
        solved = rewritten.layers()
        if what == "mlp+attention" and len(writers) == 2:
            more, middles = self._repair_attention(index, writers, cuts, rewritten)
            solved |= more
        solve_mlp = bool(writers) and (folded is not None or what != "none")
        targets: list[Tensor] = []
        if solve_mlp:
            # Before the weights are swapped: the targets may have to be computed again.
            targets = self._mlp_targets(index, folded)
        narrower = dict(cuts)
        if (cut := cuts.get("mlp")) is not None:
            known = None if folded else self.choices.neurons.get(index)
            if known is None or cut.kept == cut.size:
                del narrower["mlp"]  # narrowed when the neurons are found
            else:
                solved |= _with_neurons(block, cut, known, writers[-1])
        with self._changed(index, [*narrower.values()], solved):
            if solve_mlp:
                solved |= self._solve_mlp(
                    index, writers[-1], targets, folded, what != "none", middles
                )
            else:
                self.hidden = [
                    seen.run(block, index, hidden)
                    for seen, hidden in zip(self.originals.traces, self.hidden, strict=True)
                ]
        self.weights.update(
            {f"{self.paths[index]}.{name}": self.hold(v) for name, v in solved.items()}
        )
        if index in self.blocks.ends:
            self._cross(index)

    def _mlp_targets(self, index: int, folded: Replacement | None) -> list[Tensor]:
        """The original's sums to which the MLP adds; the states after a folded span."""
        batches = range(len(self.originals.traces))
        if folded:
            return [self.originals.returned(b, folded.span.stop - 1) for b in batches]
        return [self.originals.target(b, index) for b in batches]

    def _cross(self, index: int) -> None:
        """From what the last block of a stage returns to what the model gives to the next block."""
        assert self.hidden is not None
        model, crossed_states = self.originals.model, []
        self.ends[index] = self.hidden
        for b, seen in enumerate(self.originals.traces):
            ends = {end: states[b] for end, states in self.ends.items()}
            crossed_states.append(self.hold(crossed(model, self.blocks, seen, ends, index)))
        self.hidden = crossed_states

    @contextmanager
    def _changed(
        self, index: int, cuts: Sequence[Narrowing], weights: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Block ``index`` with these parts narrowed and these weights until the ``with`` ends."""
        block = self.originals.modules[index]
        with narrowed_block(block, cuts, weights), swapped(block, weights):
            yield

    def _narrow_keys(self, index: int, cut: Narrowing, rewritten: Rewritten) -> None:
        """Queries and keys of the best low rank on what the compressed part before produces."""
        assert self.hidden is not None
        block, width = self.originals.modules[index], cut.heads * cut.size
        if (known := self.choices.keys.get(index)) is not None:
            put_keys(rewritten, block, cut, known)
            return
        layers = {rows.layer for rows in cut.rows}
        sums = [Spread.zeros(cut.heads, cut.size) for _ in cut.rows]
        for seen, hidden in zip(self.originals.traces, self.hidden, strict=True):
            out = outputs_of(block, layers, seen.runner(block, index), hidden)
            pair = [out[r.layer][..., r.start : r.start + width] for r in cut.rows]
            more = (
                Spread.of(real_rows(pair[0], seen.real_in(index)), cut.heads),
                Spread.of(centred(pair[1], seen.real_in(index)), cut.heads),
            )
            sums = [one + other for one, other in zip(sums, more, strict=True)]
        queries, keys = (one.over_ranks() for one in sums)
        bases = self.choices.keys[index] = self._held(key_bases(queries, keys))
        put_keys(rewritten, block, cut, bases)

    def _held(self, bases: list[Basis]) -> list[Basis]:
        """Those of all blocks take as much as a tenth of a large model."""
        return [
            replace(basis, left=self.hold(basis.left), right=self.hold(basis.right))
            for basis in bases
        ]

    def _repair_attention(
        self,
        index: int,
        writers: list[Writer],
        cuts: Mapping[str, Narrowing],
        rewritten: Rewritten,
    ) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        """Solve the attention's output weights towards the original's state before the MLP.

        Returns the weights, and the states before the MLP's contribution that they give, where
        these follow without running the block again.
        """
        assert self.hidden is not None
        block, attention, mlp = self.originals.modules[index], writers[0], writers[-1]
        silent = {attention.name: 0.0, mlp.name: 0.0}
        bare = self.originals.probe.bare(index)
        read, bases = [], []
        narrower = [cuts["keys"]] if "keys" in cuts else []
        with self._changed(index, narrower, rewritten.layers()):
            for seen, hidden in zip(self.originals.traces, self.hidden, strict=True):
                run = seen.runner(block, index)
                x = input_of(block, attention.name, run, hidden)
                read.append(self.hold(attention.rows(x, len(hidden))))
                base = hidden
                if not bare:
                    with written(block, silent):
                        base = attention.tokens(attention.sum(block, run, hidden))
                bases.append(base)
        solved: dict[str, Tensor] = {}
        prior, ridge = attention.effective(block), self.options.repair_ridge
        if (cut := cuts.get("values")) is not None:
            read, prior = self._narrow_values(attention, cut, read, rewritten)
            solved = rewritten.layers()
            ridge = self.options.narrow_ridge
        draw = self._draw(index, prior[0].shape[1], bool(cuts))
        sums = self._repair_sums(prior[0])
        for b, (x, base) in enumerate(zip(read, bases, strict=True)):
            gap = self.originals.middle(b, index, draw) - self._drawn(b, index, draw, base)
            sums.add(self._drawn(b, index, draw, x), gap, self._weights(b, index, draw, base))
        solved |= self._solved(block, attention, sums.total(), prior, ridge)
        if not bare:
            return solved, None
        writes = {n: v for n, v in solved.items() if n.startswith(attention.name + ".")}
        with swapped(block, writes):
            return solved, [
                self.hold(hidden + attention.contribution(block, x))
                for hidden, x in zip(self.hidden, read, strict=True)
            ]

    def _narrow_values(
        self, attention: Writer, cut: Narrowing, read: list[Tensor], rewritten: Rewritten
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor | None]]:
        """What the narrower projection reads, and its weights to start from."""
        block = self.originals.modules[cut.block]
        weight, bias = attention.effective(block)
        bases = self.choices.values.get(cut.block)
        if bases is None:
            mixed = Spread.zeros(cut.heads, cut.size)
            for seen, x in zip(self.originals.traces, read, strict=True):
                mixed = mixed + Spread.of(real_rows(x, seen.real_in(cut.block)), cut.heads)
            bases = self.choices.values[cut.block] = self._held(
                value_bases(mixed.over_ranks(), weight)
            )
        put_values(rewritten, block, cut, bases)
        prior = values_prior(cut, bases), bias
        return [self.hold(narrowed_values(cut, bases, x)) for x in read], prior

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
        block, cut = self.originals.modules[index], self.plan.at(index).get("mlp")
        weight, bias = mlp.effective(block)
        bases, regressors = self._mlp_inputs(index, mlp, middles)
        prior = (weight, bias)
        if folded:
            prior = self._fold(index, targets, weight, bias, bases, regressors)
        solved: dict[str, Tensor] = {}
        if repair:
            whole = weight.shape[1] if cut is None else cut.size
            draw = self._draw(index, whole, cut is not None)
            sums = self._repair_sums(weight)
            for b, (base, x) in enumerate(zip(bases, regressors, strict=True)):
                target = mlp.tokens(targets[b])
                gap = self._drawn(b, index, draw, target) - self._drawn(b, index, draw, base)
                sums.add(self._drawn(b, index, draw, x), gap, self._weights(b, index, draw, base))
            problem, ridge = sums.total(), self.options.repair_ridge
            if cut is not None:
                ridge = self.options.narrow_ridge
                kept = self._neurons(index, cut, problem, prior[0])
                prior = (kept.weight.double().T, prior[1])
                if weight.shape[1] == cut.size:
                    problem = of_some(problem, kept.neurons)
                    regressors = [self.hold(x[..., kept.neurons.to(x.device)]) for x in regressors]
                    solved = _with_neurons(block, cut, kept, mlp)
            solved |= self._solved(block, mlp, problem, prior, ridge)
        else:
            solved = mlp.stored(block, *prior)
        self._pass(index, mlp, solved, bases, regressors, targets)
        return solved

    def _pass(
        self,
        index: int,
        mlp: Writer,
        solved: Mapping[str, Tensor],
        bases: list[Tensor],
        regressors: list[Tensor],
        targets: list[Tensor],
    ) -> None:
        """The states after a block whose MLP is solved; ``targets`` have their shapes."""
        assert self.hidden is not None
        block, cut = self.originals.modules[index], self.plan.at(index).get("mlp")
        if mlp.given_to:  # the sum is not yet what the block returns
            whole = mlp.linear(block).in_features
            cuts = [cut] if cut is not None and whole == cut.size > cut.kept else []
            with self._changed(index, cuts, solved):
                self.hidden = [
                    self.hold(seen.run(block, index, hidden))
                    for seen, hidden in zip(self.originals.traces, self.hidden, strict=True)
                ]
            return
        writes = {n: v for n, v in solved.items() if n.startswith(mlp.name + ".")}
        with swapped(block, writes):
            self.hidden = [
                self.hold(mlp.layout(base + mlp.contribution(block, x), target.shape))
                for base, x, target in zip(bases, regressors, targets, strict=True)
            ]

    def _mlp_inputs(
        self, index: int, mlp: Writer, middles: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Batch by batch, the states before the MLP's contribution, and what its writer reads."""
        assert self.hidden is not None
        block = self.originals.modules[index]
        bases, regressors = [], []
        for b, (seen, hidden) in enumerate(zip(self.originals.traces, self.hidden, strict=True)):
            if middles is None:
                with inputs_of(block, mlp.name) as inputs, written(block, {mlp.name: 0.0}):
                    base = mlp.sum(block, seen.runner(block, index), hidden)
                bases.append(self.hold(mlp.tokens(base)))
                regressors.append(self.hold(mlp.rows(inputs[0], len(hidden))))
            else:
                bases.append(middles[b])
                run, skip = seen.runner(block, index), self.originals.probe.skip(index)
                given = hidden if skip is None else middles[b]
                with left_out(block, skip):
                    regressors.append(self.hold(input_of(block, mlp.name, run, given)))
        return bases, regressors

    def _neurons(self, index: int, cut: Narrowing, problem: Regression, weight: Tensor) -> Kept:
        """Those of an MLP that stay, from its sums where they are not known."""
        if problem.xx.shape[0] == cut.kept < cut.size:
            return self.choices.neurons[index]
        kept = neurons_removed(problem, weight, [cut.kept]).kept[cut.kept]
        self.choices.neurons[index] = Kept(kept.neurons, self.hold(kept.weight.float()))
        return kept

    def _fold(
        self,
        index: int,
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
        whole = Draw(self.blocks.prefix_tokens)
        sums = RowSums(weight.shape[0], weight.shape[0], torch.float64)
        for b, (base, x) in enumerate(zip(bases, regressors, strict=True)):
            contribution = nn.functional.linear(
                x, weight.to(x), None if bias is None else bias.to(x)
            )
            made, gap = (self._drawn(b, index, whole, v) for v in (contribution, targets[b] - base))
            sums.add(made, gap, self._weights(b, index, whole, base))
        ridge = RIDGE if self.options.ridge is None else self.options.ridge
        fitted = fit_affine(sums.total(), ridge, bias=bias is not None)
        if bias is not None:
            bias = fitted.weight @ bias + fitted.bias
        return fitted.weight @ weight, bias

    def _draw(self, index: int, inputs: int, narrowed: bool) -> Draw:
        rows = NARROW_ROWS_PER_INPUT if narrowed else None
        tokens = self.originals.tokens_of(index)
        return Draw.limited(self.blocks.prefix_tokens, tokens, inputs, rows)

    def _drawn(self, batch: int, index: int, draw: Draw, values: Tensor) -> Tensor:
        return self.originals.drawn(batch, index, draw, values)

    def _weights(self, batch: int, index: int, draw: Draw, states: Tensor) -> Tensor | None:
        """Of the tokens drawn of each of states (images, tokens, width)."""
        weight, tokens = self.options.prefix_weight, states.shape[1]
        return self.originals.weights(batch, index, draw, weight, tokens)

    def _repair_sums(self, weight: Tensor) -> RowSums:
        ridge = min(self.options.repair_ridge, self.options.narrow_ridge)
        enough = torch.float32 if ridge >= 1e-3 else torch.float64
        return RowSums(weight.shape[1], weight.shape[0], enough)

    def _solved(
        self,
        block: nn.Module,
        writer: Writer,
        problem: Regression,
        prior: tuple[Tensor, Tensor | None],
        ridge: float,
    ) -> dict[str, Tensor]:
        weight, bias = prior
        fitted = fit_affine(problem, ridge, prior=weight, bias=bias is not None)
        return writer.stored(block, fitted.weight, fitted.bias)


def _with_neurons(block: nn.Module, cut: Narrowing, kept: Kept, mlp: Writer) -> Layers:
    """An MLP's layers with some of its neurons: those that make them, and its output weights."""
    rewritten = Rewritten(block)
    put_neurons(rewritten, block, cut, kept)
    _, bias = mlp.effective(block)
    return rewritten.layers() | mlp.stored(block, kept.weight.T, bias)
