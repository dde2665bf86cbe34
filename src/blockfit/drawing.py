"""Pictures by matplotlib on axes of the user's or of pyplot, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from blockfit.errors import need

SIZES = {
    "parameters": "parameters that remain",
    "flops": "FLOPs that remain",
    "latency": "latency that remains",
}
LOSSES = {
    "kl": "KL from the original (nats)",
    "top1": "top-1 accuracy",
    "agreement": "top-1 agreement",
    "feature_relative_error": "relative feature error",
}
METRIC_WORDS = {
    "mse": "MSE",
    "cosine": "cosine",
    "angular": "angular distance",
    "cka": "linear CKA",
    "r2": "R² of an affine map",
}

COLOURS = ("#0b6e75", "#b4530a", "#59616d")
"""Of the first thing that is drawn, the second, the third."""


def axes_of(ax: Any, width: float = 5.0, height: float = 3.4) -> Any:
    """The axes to draw on: ``ax``, or those of a new figure of pyplot.

    Raises:
        BlockfitError: where matplotlib is not installed.
    """
    if ax is not None:
        return ax
    pyplot = need("matplotlib.pyplot", "plots", "plot()")
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def heat_map(
    axis: Any,
    boundaries: Sequence[int],
    table: Sequence[Sequence[float | None]],
    log: bool,
    most_ticks: int = 7,
) -> Any:
    """One metric between all pairs of hidden states; what is not defined stays blank.

    Args:
        boundaries: numbers of the hidden states, of rows and columns.
        table: a value, or ``None``, per pair.

    Returns:
        The colour bar.
    """
    from matplotlib.colors import LogNorm

    cells = [
        [math.nan if v is None or (log and v <= 0) else float(v) for v in line] for line in table
    ]
    norm = LogNorm() if log and any(v > 0 for line in cells for v in line) else None
    image = axis.imshow(cells, cmap="viridis", interpolation="none", norm=norm)
    ticks = range(0, len(boundaries), -(-len(boundaries) // most_ticks))
    axis.set_xticks(ticks, [boundaries[t] for t in ticks])
    axis.set_yticks(ticks, [boundaries[t] for t in ticks])
    return axis.figure.colorbar(image, ax=axis, shrink=0.9, pad=0.02)


def blocks(
    axis: Any,
    depth: int,
    left: Mapping[str, Mapping[int, float]],
    gone: Mapping[tuple[int, int], str],
) -> None:
    """What is left of the parts of every block, as bars; a shaded band where blocks are gone.

    Args:
        left: by the name of a part, the share that each narrowed block keeps of it.
        gone: first and last block of a span → what stands in its place.
    """
    lost = {block for first, last in gone for block in range(first, last + 1)}
    kept = [block for block in range(depth) if block not in lost]
    width = 0.8 / max(len(left), 1)
    for place, (name, shares) in enumerate(left.items()):
        at = [block - 0.4 + (place + 0.5) * width for block in kept]
        heights = [shares.get(block, 1.0) for block in kept]
        axis.bar(at, heights, width * 0.9, label=name, color=COLOURS[place % len(COLOURS)])
    if not left:
        axis.bar(kept, [1.0] * len(kept), 0.8, color=COLOURS[0], label="kept")
    for (first, last), stands in gone.items():
        axis.axvspan(first - 0.45, last + 0.45, color="#d8dce2", lw=0)
        axis.text(
            (first + last) / 2, 0.5, stands, rotation=90, ha="center", va="center", fontsize=8
        )
    axis.set(xlabel="block", ylabel="what is left", xlim=(-0.6, depth - 0.4), ylim=(0, 1.02))
    axis.set_xticks(range(0, depth, -(-depth // 16)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if left:
        axis.legend(ncols=3, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))


def curve(
    axis: Any,
    points: Sequence[tuple[float, float, tuple[float, float] | None]],
    size: str,
    loss: str,
    whole: float | None = None,
) -> None:
    """A loss of plans against what they leave, with intervals where there are any.

    Args:
        points: share that remains, value, low and high end of its interval.
        whole: the original's value, as a line.
    """
    shares, values = [x for x, _, _ in points], [y for _, y, _ in points]
    part = loss in ("agreement", "top1")
    ends = [ends or (y, y) for _, y, ends in points]
    error = [
        [max(y - low, 0.0) for (low, _), y in zip(ends, values, strict=True)],
        [max(high - y, 0.0) for (_, high), y in zip(ends, values, strict=True)],
    ]
    axis.errorbar(shares, values, yerr=error, fmt="o-", color=COLOURS[0], lw=1.2, capsize=2)
    if whole is not None:
        axis.axhline(whole, color=COLOURS[1], lw=1.2, ls="--", label="original")
        axis.legend(fontsize=8, frameon=False)
    if not part and all(y > 0 for y in values):
        axis.set_yscale("log")
    elif part:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(alpha=0.3)
    axis.set(xlabel=SIZES[size], ylabel=LOSSES[loss])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.invert_xaxis()


def shares(axis: Any, left: Mapping[str, float]) -> None:
    """What remains of the original, a bar each with its percentage."""
    names = [*left][::-1]
    bars = axis.barh(names, [left[name] for name in names], color=COLOURS[0], height=0.6)
    axis.bar_label(bars, [f"{left[name]:.1%}" for name in names], padding=3, fontsize=8)
    axis.axvline(1, color=COLOURS[1], lw=1.2, ls="--")
    axis.set(xlabel="of the original", xlim=(0, 1.15 * max(1.0, *left.values())))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
