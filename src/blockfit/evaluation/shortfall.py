"""Why a compressed model is not as much faster as its FLOPs promise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from blockfit.errors import BlockfitError
from blockfit.evaluation.speed import Row, Shares
from blockfit.models.blocks import Blocks, block_modules
from blockfit.models.cost import wait
from blockfit.models.surgery import removed_plan

ENOUGH = 0.95
"""Part of the promised speed-up from which on nothing needs explaining."""

WORTH = 1.02
"""Promised speed-ups below this are too small to be felt."""

OVERHEAD = 1.5
"""An image that takes this many times as long as in a large batch is paid for in overhead."""

PASSES = 5
"""Forward passes that are looked into."""


def block_shares(
    original: nn.Module, small: nn.Module, blocks: Blocks, run: tuple[Callable[[], object], ...]
) -> Shares | None:
    """The parts of the original's time that the cut blocks took, and take now.

    Args:
        run: one forward pass of each.

    Returns:
        ``None`` where nothing was cut or the original has no such blocks.
    """
    plan = removed_plan(small, blocks)
    try:
        places = [block_modules(model, blocks) for model in (original, small)]
    except BlockfitError:
        return None
    if not plan:
        return None
    cut = [*plan.removed_blocks, *plan.narrowed_blocks]
    heads = dict.fromkeys(
        (n.block, name)
        for n in plan.narrowings
        if n.part != "mlp"
        for name in [*(rows.layer for rows in n.rows), *filter(None, [n.reader])]
    )
    of_blocks, of_heads = [], []
    for modules in places:
        of_blocks.append([modules[index] for index in cut])
        of_heads.append([modules[index].get_submodule(name) for index, name in heads])
    whole, before = _median(of_blocks[0], run[0])
    after = _median(of_blocks[1], run[1])[1]
    layers = None
    if heads:
        some = [_median(layers, pass_) for layers, pass_ in zip(of_heads, run, strict=True)]
        layers = some[0][1] / some[0][0], some[1][1] / some[0][0]
    return Shares(before / whole, after / whole, bool(plan.narrowings), layers)


def _median(modules: Sequence[nn.Module], run: Callable[[], object]) -> tuple[float, float]:
    """``_looked_into`` over several passes."""
    passes = [_looked_into(modules, run) for _ in range(PASSES)]
    whole, inside = (statistics.median(values) for values in zip(*passes, strict=True))
    return whole, inside


def _looked_into(modules: Sequence[nn.Module], run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one pass, and of all ``modules`` in it."""
    device = next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))
    clock: list[float] = []

    def tick(*_: Any) -> None:
        wait(device)
        clock.append(time.perf_counter())

    with ExitStack() as undo:
        for module in modules:
            undo.enter_context(module.register_forward_pre_hook(tick))
            undo.enter_context(module.register_forward_hook(tick))
        start = time.perf_counter()
        run()
        taken = time.perf_counter() - start
    return taken, sum(clock[1::2]) - sum(clock[::2])


def remarks(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """Sentences on a gain that is missing or smaller than promised, and why.

    Args:
        rows: all rows, among which other batch sizes are looked up.
    """
    low, high = row.quartiles
    said = []
    if high < 1:
        said.append(f"slower than the original: {row.measured:.2f}×")
    elif low <= 1:
        said.append(
            f"no gain can be told: the middle half of the rounds lies between {low:.2f}× and "
            f"{high:.2f}×"
        )
    if row.promised is None:
        said.append("FLOPs are unknown, so nothing is promised")
    elif row.promised < WORTH:
        said.append(f"the FLOPs promise no more than {row.promised:.2f}×")
    elif row.measured < ENOUGH * row.promised:
        said.append(
            f"{row.measured / row.promised:.0%} of the promise: {_why(row, row.promised, rows)}"
        )
    heads = None if row.shares is None else row.shares.heads
    if heads is not None and heads[1] > ENOUGH * heads[0]:
        said.append(
            "narrower values, queries and keys save parameters and no time here: their layers took "
            f"{heads[0]:.1%} of the time and take {heads[1]:.1%}, and attention's own cost is in "
            "the tokens"
        )
    return tuple(said)


def _why(row: Row, promised: float, rows: Sequence[Row]) -> str:
    _, high = row.quartiles
    slower = _overhead(row, rows)
    if slower is not None and slower[0] > OVERHEAD:
        return (
            f"an image takes {slower[0]:.1f} times as long as in a batch of {slower[1]}, so most "
            "of the pass is overhead that FLOPs do not count"
        )
    shares = row.shares
    if shares is not None and shares.promised < ENOUGH * promised:
        what = "removed blocks took {} of the time and their maps take {}"
        if shares.narrowed:
            what = "blocks that were cut took {} of the time and what is left of them takes {}"
        told = what.format(f"{shares.removed:.1%}", f"{shares.maps:.1%}")
        return f"the {told}, which allows {shares.promised:.2f}×"
    if high >= ENOUGH * promised:
        return (
            f"the rounds scatter up to {high:.2f}×; time more rounds, or measure on a quieter "
            "machine"
        )
    return "the parts that are left take longer than their FLOPs say"


def _overhead(row: Row, rows: Sequence[Row]) -> tuple[float, int] | None:
    """How much longer the original takes per image than in the largest batch measured."""
    alike = [
        other
        for other in rows
        if other.name == row.name
        and (other.setting.engine, other.setting.dtype) == (row.setting.engine, row.setting.dtype)
    ]
    largest = max(alike, key=lambda other: other.setting.batch_size)
    size = largest.setting.batch_size
    if size <= row.setting.batch_size:
        return None
    return largest.before.images_per_second / row.before.images_per_second, size
