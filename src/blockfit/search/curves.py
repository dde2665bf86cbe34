"""What narrowing every part of every block would cost: errors for all widths, effects for a few.

One pass over the fit images gives the error curve of each part. What an error does to the model's
output is measured on held-out images at a few widths and interpolated between them: the logarithm
of the effect is close to linear in that of the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockfit.fit.moments import Spread
from blockfit.fit.plan import Narrowing, Plan
from blockfit.models.blocks import block_paths
from blockfit.models.forward import evaluating
from blockfit.models.narrowed import Layer
from blockfit.models.padding import real_rows
from blockfit.models.residual import Writer
from blockfit.progress import Progress, silent
from blockfit.search.held_out import HeldOut
from blockfit.search.narrowing import (
    Layers,
    Rewritten,
    centred,
    key_bases,
    narrowed_values,
    neurons_removed,
    put_keys,
    put_neurons,
    put_values,
    value_bases,
    values_prior,
)
from blockfit.search.solve import Solution
from blockfit.search.states import TracedImages
from blockfit.search.tokens import Draw

TRIALS = {"mlp": (0.6, 0.3), "values": (0.5,), "keys": (0.4,)}
"""Parts of the full width at which effects are measured by forward passes."""

MULTIPLES = {"mlp": 32, "values": 8, "keys": 8}
"""Widths that kernels like: neurons of an MLP, dimensions of a head."""

CURVE_INPUTS = 4
"""Tokens per neuron that the order of removal is found from, where there are more."""


@dataclass(frozen=True)
class Curve:
    """One part of one block at every width that may be chosen.

    Args:
        whole: the part at its full size.
        widths: descending, the full size first.
        effects: what each does to the output, 0 at the full size.
        unit: parameters of one dimension.
        unit_flops: floating-point operations of one dimension, for one image.
    """

    whole: Narrowing
    widths: tuple[int, ...]
    effects: tuple[float, ...]
    unit: int
    unit_flops: int


def key_of(curve: Curve) -> tuple[int, str]:
    """Block and part of a curve."""
    return curve.whole.block, curve.whole.part


def widths_of(part: Narrowing, multiple: int | None = None) -> tuple[int, ...]:
    """Widths that a part may keep, descending: its size, then multiples of ``multiple``.

    By default of what kernels like, or of a quarter of a small part.
    """
    step = multiple or min(MULTIPLES[part.part], max(1, part.size // 4))
    return (part.size, *range((part.size - 1) // step * step, 0, -step))


def interpolated(
    widths: Sequence[int], errors: dict[int, float], measured: dict[int, float]
) -> tuple[float, ...]:
    """The effect at every width, from that at a few.

    Args:
        widths: descending, the full size first.
        errors: width → error; those in between are interpolated.
        measured: width → effect, at widths of ``errors``.

    Returns:
        effects that grow as the widths shrink, 0 for the full size.
    """
    tiny = 1e-30
    known = sorted(errors, reverse=True)
    logs = [math.log(max(errors[w], tiny)) for w in known]
    at = {w: float(np.interp(-w, [-k for k in known], logs)) for w in {*widths, *measured}}
    trials = sorted(measured, reverse=True)
    xs = [at[w] for w in trials]
    ys = [math.log(max(measured[w], tiny)) for w in trials]
    out = []
    for width in widths:
        x = at[width]
        if width == widths[0]:
            out.append(0.0)
        elif x <= xs[0]:
            out.append(math.exp(ys[0] + x - xs[0]))  # small effects grow like the error itself
        elif x >= xs[-1]:
            out.append(math.exp(ys[-1] + x - xs[-1]))
        else:
            out.append(math.exp(float(np.interp(x, xs, ys))))
    return tuple(float(v) for v in np.maximum.accumulate(out))


class PartSums:
    """The sums of one block that its parts' curves are made of."""

    def __init__(self, originals: TracedImages, index: int) -> None:
        self.block, self.index = originals.modules[index], index
        self.writers = originals.probe.writers(index)
        self.parts = dict(originals.probe.parts(index).whole)
        self.sums = {
            name: Spread.zeros(part.heads, part.size)
            for kind, part in self.parts.items()
            for name in (("queries", "keys") if kind == "keys" else (kind,))
        }
        for b, seen in enumerate(originals.traces):
            hidden = originals.state(b, index)
            taken = self._seen(seen.runner(self.block, index), hidden)
            self._add(originals, taken, b)
        self.sums = {name: spread.over_ranks() for name, spread in self.sums.items()}

    def _seen(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """Outputs of the layers of queries and keys, inputs of the writers."""
        taken: dict[str, Tensor] = {}

        def output(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Tensor) -> None:
                taken[name] = out.detach()

            return hook

        def given(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                taken[f"> {name}"] = args[0].detach()

            return hook

        with ExitStack() as undo:
            if (keys := self.parts.get("keys")) is not None:
                for name in {rows.layer for rows in keys.rows}:
                    layer = self.block.get_submodule(name)
                    undo.enter_context(layer.register_forward_hook(output(name)))
            for name in {part.reader for part in self.parts.values() if part.reader}:
                layer = self.block.get_submodule(name)
                undo.enter_context(layer.register_forward_pre_hook(given(name)))
            run(hidden)
        return taken

    def _add(self, originals: TracedImages, taken: dict[str, Tensor], batch: int) -> None:
        found: dict[str, Spread] = {}
        images, real = len(originals.places(batch)), originals.traces[batch].real_in(self.index)
        if (mlp := self.parts.get("mlp")) is not None:
            rows = self.writers[-1].rows(taken[f"> {mlp.reader}"], images)
            prefix, tokens = originals.blocks.prefix_tokens, originals.tokens_of(self.index)
            draw = Draw.limited(prefix, tokens, mlp.size, CURVE_INPUTS)
            found["mlp"] = Spread.of(
                originals.drawn(batch, self.index, draw, rows), 1, torch.float32
            )
        if (values := self.parts.get("values")) is not None:
            mixed = self.writers[0].rows(taken[f"> {values.reader}"], images)
            found["values"] = Spread.of(real_rows(mixed, real), values.heads)
        if (keys := self.parts.get("keys")) is not None:
            width = keys.heads * keys.size
            pair = [taken[r.layer][..., r.start : r.start + width] for r in keys.rows]
            found["queries"] = Spread.of(real_rows(pair[0], real), keys.heads)
            found["keys"] = Spread.of(centred(pair[1], real), keys.heads)
        for name, spread in found.items():
            self.sums[name] = self.sums[name] + spread


def candidates(
    sums: PartSums, part: Narrowing, widths: Sequence[int], smallest: int
) -> tuple[dict[int, float], dict[int, Layers]]:
    """The error curve of a part, and the layers of the block at some widths.

    Args:
        part: at its full size.
        widths: where the layers are wanted.
        smallest: where the curve may end.

    Returns:
        width → error for all widths that are known, and width → parameters of the block.
    """
    if part.part == "mlp":
        return _mlp_candidates(sums, part, widths, smallest)
    block = sums.block
    if part.part == "keys":
        bases = key_bases(sums.sums["queries"], sums.sums["keys"])
        put, writes = put_keys, None
    else:
        attention = sums.writers[0]
        weight, _ = attention.effective(block)
        bases = value_bases(sums.sums["values"], weight)
        put, writes = put_values, attention
    total = torch.stack([basis.errors for basis in bases]).sum(0)
    errors = {width: float(total[width]) for width in range(1, part.size + 1)}
    layers = {}
    for width in widths:
        cut = replace(part, kept=width)
        rewritten = Rewritten(block)
        put(rewritten, block, cut, bases)
        layers[width] = rewritten.layers()
        if writes is not None:
            weight, _ = writes.effective(block)
            prior = values_prior(cut, bases)
            mean = sums.sums["values"].mean.flatten()
            bias = _shifted(writes, block, weight, mean, prior, _taken(cut, bases, mean))
            layers[width] |= writes.stored(block, prior, bias)
    return errors, layers


def _taken(cut: Narrowing, bases: Any, mean: Tensor) -> Tensor:
    return narrowed_values(cut, bases, mean[None])[0]


def _shifted(
    writer: Writer, block: nn.Module, weight: Tensor, mean: Tensor, new: Tensor, new_mean: Tensor
) -> Tensor | None:
    """The bias with which the mean of what is written stays as it was."""
    _, bias = writer.effective(block)
    return None if bias is None else bias + weight @ mean - new @ new_mean


def _mlp_candidates(
    sums: PartSums, part: Narrowing, widths: Sequence[int], smallest: int
) -> tuple[dict[int, float], dict[int, Layers]]:
    block, writer = sums.block, sums.writers[-1]
    weight, _ = writer.effective(block)
    removal = neurons_removed(sums.sums["mlp"], weight, [*widths, smallest])
    mean = sums.sums["mlp"].mean[0]
    layers = {}
    for width in widths:
        kept, cut = removal.kept[width], replace(part, kept=width)
        rewritten = Rewritten(block)
        put_neurons(rewritten, block, cut, kept)
        bias = _shifted(writer, block, weight, mean, kept.weight.T, mean[kept.neurons])
        layers[width] = rewritten.layers() | writer.stored(block, kept.weight.T, bias)
    return removal.errors, layers


def curves(
    originals: TracedImages,
    held_out: HeldOut,
    parts: Iterable[str],
    whole_blocks: Iterable[int] = (),
    *,
    multiple: int | None = None,
    progress: Progress = silent,
    failed: dict[Plan, str] | None = None,
) -> list[Curve]:
    """The curves of all parts that can be narrowed.

    Args:
        multiple: chosen widths of MLPs are multiples of it.
        failed: plans that the model cannot be run with, and why, are written into it.
    """
    failed = {} if failed is None else failed
    wanted, whole = set(parts), set(whole_blocks)
    depth = originals.blocks.depth
    paths = block_paths(originals.model, originals.blocks)
    out: list[Curve] = []
    with evaluating(originals.model), torch.no_grad():
        for index in range(depth):
            if index not in whole:
                out += _block_curves(
                    originals, held_out, index, wanted, paths[index], multiple, failed
                )
                originals.tidy()
            progress(index + 1, depth)
    return out


def _block_curves(
    originals: TracedImages,
    held_out: HeldOut,
    index: int,
    wanted: set[str],
    prefix: str,
    multiple: int | None,
    failed: dict[Plan, str],
) -> list[Curve]:
    found = {n: p for n, p in originals.probe.parts(index).whole.items() if n in wanted}
    if not found:
        return []
    sums = PartSums(originals, index)
    out = []
    for name, part in found.items():
        widths = widths_of(part, multiple if name == "mlp" else None)
        if len(widths) == 1:
            continue  # smaller than what its widths are to be multiples of
        trials = _trial_widths(part, widths)
        errors, layers = candidates(sums, part, trials, widths[-1])
        solutions = [
            Solution(
                Plan((), (replace(part, kept=width),)),
                (),
                {f"{prefix}.{key}": value for key, value in layers[width].items()},
            )
            for width in trials
        ]
        half = range((len(held_out.sizes) + 1) // 2)  # of heads, which do less
        scores = held_out.effects(solutions, failed, None if name == "mlp" else half)
        pairs = zip(trials, scores, strict=True)
        measured = {width: score for width, score in pairs if score is not None}
        if not measured:
            continue  # the model does not run with a narrower part: it stays whole
        effects = interpolated(widths, errors, measured)
        unit = unit_cost(sums.block, part, originals.probe.tokens(index))
        out.append(Curve(part, widths, effects, *unit))
    return out


def _trial_widths(part: Narrowing, widths: Sequence[int]) -> list[int]:
    shares = TRIALS[part.part]
    near = [min(widths[1:], key=lambda w: abs(w - share * part.size)) for share in shares]
    return list(dict.fromkeys(near))


def unit_cost(block: nn.Module, part: Narrowing, tokens: int) -> tuple[int, int]:
    """Parameters, and FLOPs for one image, that one dimension less takes away in all heads."""
    weights = biases = 0
    for rows in part.rows:
        layer = block.get_submodule(rows.layer)
        assert isinstance(layer, Layer)
        weights += layer.weight[0].numel()
        biases += layer.bias is not None
    if part.reader:
        reader = block.get_submodule(part.reader)
        assert isinstance(reader, nn.Linear)
        weights += reader.out_features
    return part.heads * (weights + biases), 2 * tokens * part.heads * weights
