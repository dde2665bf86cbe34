"""Baselines: published ways to narrow all MLPs alike, on the parts and images that a search has.

Everything is taken from the original's own states, and nothing is repaired: the methods as they
were published (``fit.published``), so that a table beside blockfit's plans is a fair one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.arguments import one_of
from blockfit.errors import BlockfitError
from blockfit.fit.moments import Spread
from blockfit.fit.narrow import Kept
from blockfit.fit.plan import Narrowing, Plan
from blockfit.fit.published import (
    BASELINES,
    active_above,
    energy_by_activity,
    folded_neurons,
    group_magnitude,
    kept_of,
    mean_into_bias,
    variance,
)
from blockfit.models.blocks import block_paths
from blockfit.models.forward import evaluating
from blockfit.models.narrowed import Layer
from blockfit.models.padding import real_rows
from blockfit.models.residual import input_of
from blockfit.search.budget import Sizes
from blockfit.search.narrowing import Layers, Rewritten, put_neurons, rows_of
from blockfit.search.solve import Solution
from blockfit.search.states import TracedImages


class Neurons:
    """What the neurons of the original's MLPs do on the fit images; taken once, block by block."""

    def __init__(self, originals: TracedImages) -> None:
        self.originals = originals
        self._spreads: dict[int, Spread] = {}
        self._active: dict[int, Tensor] = {}

    def mlps(self) -> list[Narrowing]:
        """The MLP of every block at its full size.

        Raises:
            BlockfitError: where one cannot be narrowed.
        """
        out = []
        for index in range(self.originals.blocks.depth):
            parts = self.originals.probe.parts(index)
            if "mlp" not in parts.whole:
                raise BlockfitError(
                    f"the MLP of block {index} cannot be narrowed: {parts.refused['mlp']}; "
                    "choose another recipe"
                )
            out.append(parts.whole["mlp"])
        return out

    def spread(self, part: Narrowing) -> Spread:
        """Sums over an MLP's neurons after their activation, on all tokens."""
        if part.block not in self._spreads:
            total: Spread | None = None
            for batch in range(len(self.originals.traces)):
                rows = Spread.of(self._read(batch, part), 1, torch.float32)
                total = rows if total is None else total + rows
            assert total is not None
            total = total.over_ranks()
            self._spreads[part.block] = replace(total, xx=self.originals.hold(total.xx))
        return self._spreads[part.block]

    def active(self, part: Narrowing) -> Tensor:
        """On how many tokens every neuron is active, shape (p,)."""
        if part.block not in self._active:
            least = active_above(self.spread(part))
            count = torch.zeros(part.size, dtype=torch.float64)
            for batch in range(len(self.originals.traces)):
                rows = self._read(batch, part).flatten(0, -2)
                count += (rows.abs() > least).sum(0).cpu()
            ranks.reduce([count])
            self._active[part.block] = count
        return self._active[part.block]

    def _read(self, batch: int, part: Narrowing) -> Tensor:
        block, seen = self.originals.modules[part.block], self.originals.traces[batch]
        hidden = self.originals.state(batch, part.block)
        read = input_of(block, part.reader, seen.runner(block, part.block), hidden)
        return real_rows(read, seen.real_in(part.block))


class Baseline:
    """One published method: plans that keep the same share of all MLPs' neurons, and their weights.

    Raises:
        BlockfitError: an unknown method, or an MLP that cannot be narrowed.
    """

    def __init__(self, neurons: Neurons, method: str) -> None:
        one_of("baseline", method, BASELINES)
        self._neurons, self.method, self._mlps = neurons, method, neurons.mlps()

    def plan(self, sizes: Sizes, kind: str, value: float) -> Plan:
        """The plan that keeps most neurons of those that meet a budget.

        Args:
            sizes: counts parameters and FLOPs of any plan.
            kind: ``params`` or ``flops``.
            value: the part of the original that may remain.

        Raises:
            BlockfitError: where one neuron in every MLP is still too much.
        """

        def meets(kept: int) -> bool:
            return sizes.known_fraction(self._keeping(kept), kind) <= value + 1e-9

        if not meets(1):
            left = sizes.known_fraction(self._keeping(1), kind)
            raise BlockfitError(
                f"{kind} {value:.1%} cannot be reached: {self.method} cuts MLPs alone, and with "
                f"one neuron in each {left:.1%} remains; ask for more"
            )
        low, high = 1, max(part.size for part in self._mlps) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if meets(middle) else (low, middle)
        return self._keeping(low)

    def _keeping(self, kept: int) -> Plan:
        """The same share of every MLP; ``kept`` neurons of the widest."""
        widest = max(part.size for part in self._mlps)
        cuts = (replace(part, kept=max(1, part.size * kept // widest)) for part in self._mlps)
        return Plan((), tuple(cut for cut in cuts if cut.kept < cut.size))

    def solution(self, plan: Plan) -> Solution:
        """The weights of a plan of narrowed MLPs."""
        originals = self._neurons.originals
        weights: dict[str, Tensor] = {}
        paths = block_paths(originals.model, originals.blocks)
        with evaluating(originals.model), torch.no_grad():
            for cut in plan.narrowings:
                layers = self._layers(cut)
                weights |= {
                    f"{paths[cut.block]}.{name}": originals.hold(v) for name, v in layers.items()
                }
        ranks.share(weights.values())
        return Solution(plan, (), weights)

    def _layers(self, cut: Narrowing) -> Layers:
        """Parameters of a block with a narrower MLP."""
        block = self._neurons.originals.modules[cut.block]
        reader = block.get_submodule(cut.reader)
        assert isinstance(reader, nn.Linear)
        weight = reader.weight.detach().cpu().double()
        bias = None if reader.bias is None else reader.bias.detach().cpu().double()
        kept = kept_of(self._scores(cut, block, weight), cut.kept)
        if self.method == "corp":
            new, shift = folded_neurons(self._neurons.spread(cut), weight, bias, kept)
        elif self.method == "vbp":
            new, shift = mean_into_bias(self._neurons.spread(cut), weight, bias, kept)
        else:
            new, shift = weight[:, kept], bias
        rewritten = Rewritten(block)
        put_neurons(rewritten, block, cut, Kept(kept, new.T))
        layers = rewritten.layers() | {f"{cut.reader}.weight": new.to(reader.weight)}
        if shift is not None:
            layers[f"{cut.reader}.bias"] = shift.to(reader.bias)
        return layers

    def _scores(self, cut: Narrowing, block: nn.Module, weight: Tensor) -> Tensor:
        if self.method == "corp":
            return energy_by_activity(self._neurons.spread(cut), self._neurons.active(cut))
        if self.method == "vbp":
            return variance(self._neurons.spread(cut))
        makes = []
        for rows in cut.rows:
            layer = block.get_submodule(rows.layer)
            assert isinstance(layer, Layer)
            makes.append(rows_of(layer, rows, cut.size)[0].flatten(1))
        return group_magnitude(makes, weight)
