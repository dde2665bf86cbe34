"""Draws the table of ``benchmarks/quality.py``: top-1 and KL over what is left of the parameters.

    python benchmarks/quality.py --out quality.json
    python benchmarks/frontier.py quality.json docs/assets/quality.svg

Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {
    "blockfit": ("#0b6e4f", "o", "blockfit"),
    "spans": ("#3f72af", "s", "whole blocks only"),
    "corp": ("#c8553d", "^", "CORP, MLP"),
    "vbp": ("#8a5a9e", "v", "VBP"),
    "paper, MSE": ("#6b6b6b", "D", "TBA as published"),
}
"""Colour, marker and label of every method that is drawn, in this order."""

FLOOR = 0.80
"""Top-1 below which a line leaves the picture: all that is of interest lies above."""


def points_of(table: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The cells of one method, the largest model first; one for every plan."""
    rows = [r for r in table["rows"] if r["method"] == method and "refused" not in r]
    plans = {round(row["parameters"], 4): row for row in rows}
    return sorted(plans.values(), key=lambda row: -row["parameters"])


def draw(axes: Axes, table: dict[str, Any], figure: str) -> None:
    """One line per method; blockfit's with its 95% intervals where ``figure`` is an accuracy."""
    for method, (colour, marker, label) in STYLES.items():
        rows = points_of(table, method)
        xs, ys = [100 * r["parameters"] for r in rows], [r[figure] for r in rows]
        if figure == "top1":
            ys = [100 * y for y in ys]
        style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4, "lw": 1.6}
        if method == "blockfit" and figure == "top1":
            ends = [r["interval"] for r in rows]
            bars = [
                [y - 100 * low for y, (low, _) in zip(ys, ends, strict=True)],
                [100 * high - y for y, (_, high) in zip(ys, ends, strict=True)],
            ]
            axes.errorbar(xs, ys, bars, capsize=2, elinewidth=0.8, label=label, **style)
        else:
            axes.plot(xs, ys, label=label, **style)
    axes.invert_xaxis()
    axes.set_xlabel("parameters left (%)")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="what quality.py wrote")
    parser.add_argument("out", type=Path, help="the picture, .svg or .png")
    args = parser.parse_args()
    table = json.loads(args.table.read_text())
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "blockfit", "font.size": 9}
    picture = Figure(figsize=(8.6, 3.1), layout="constrained")
    left, right = picture.subplots(1, 2)
    draw(left, table, "top1")
    first = 100 * table["original"]["top1"]
    left.axhline(first, color="#333333", lw=0.8, ls=":")
    left.text(left.get_xlim()[1], first, "original", ha="right", va="bottom", fontsize=8)
    left.set_ylim(100 * FLOOR, 97)
    left.set_ylabel("top-1 (%)")
    left.legend(loc="lower left", frameon=False, fontsize=8)
    draw(right, table, "kl")
    right.set_yscale("log")
    right.set_ylabel("KL from the original")
    images = f"{table['original']['images']:,} test images"
    picture.suptitle(f"Fixed head, nothing trained, 512 unlabelled images; {images}", fontsize=9)
    picture.patch.set_facecolor("white")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)
    print(f"written {args.out}")


if __name__ == "__main__":
    main()
