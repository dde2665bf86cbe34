"""Accuracy against parameters for the three families of the paper, from measured tables.

    for family in vit deit; do
        python benchmarks/quality.py --model models/$family-tiny-cifar10 \\
            --by remove --sizes 1 2 3 4 --limit 256 \\
            --methods "paper, MSE" "paper, effect" blockfit --out benchmarks/results/$family.json
    done
    cd benchmarks/results && python ../families.py ViT=vit.json DeiT=deit.json

prints one table per family, and how many parameters each way saves at a loss of at most 0.2 and 0.6
points of top-1. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

POINTS = (0.2, 0.6)
PAPER = "paper's linear map"


def rows_of(table: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each way; the paper's is, size by size, the better of its two selections.

    The better by test accuracy: the comparison errs to the paper's side.
    """
    rows = [row for row in table["rows"] if "refused" not in row]
    best: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["method"].startswith("paper"):
            size = row["size"]
            best[size] = max(row, best.get(size, row), key=lambda r: r["top1"])
    return {PAPER: [*best.values()], "blockfit": [r for r in rows if r["method"] == "blockfit"]}


def saved(rows: list[dict[str, Any]], original: float, points: float) -> float:
    """The largest share of parameters that is gone at a loss of at most ``points`` of top-1."""
    # Accuracies are counts of images: half of one is no difference.
    good = [1 - r["parameters"] for r in rows if original - r["top1"] <= points / 100 + 1e-6]
    return max(good, default=0.0)


def show(name: str, table: dict[str, Any]) -> str:
    """The table of one family, and its headline."""
    original = table["original"]["top1"]
    ways = rows_of(table)
    lines = [
        f"### {name}",
        "",
        f"Original: {original:.2%} top-1 on {table['original']['images']:,} test images.",
        "",
        "| removed blocks | " + " | ".join(f"{way}: parameters | top-1" for way in ways) + " |",
        "|---|" + "---|---|" * len(ways),
    ]
    for size in sorted({row["size"] for rows in ways.values() for row in rows}):
        cells = []
        for rows in ways.values():
            row = next((r for r in rows if r["size"] == size), None)
            if row is None:
                cells.append("– | –")
                continue
            change = 100 * (row["top1"] - original)
            cells.append(f"{row['parameters'] - 1:+.1%} | {row['top1']:.2%} ({change:+.2f})")
        lines.append(f"| {size:g} | " + " | ".join(cells) + " |")
    for points in POINTS:
        told = ", ".join(f"{saved(rows, original, points):.1%} ({w})" for w, rows in ways.items())
        lines += ["", f"At most {points} points lost: fewer parameters by {told}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", metavar="FAMILY=FILE", help="of quality.py")
    for pair in parser.parse_args().tables:
        name, _, file = pair.partition("=")
        print(show(name, json.loads(Path(file).read_text(encoding="utf-8"))), end="\n\n")


if __name__ == "__main__":
    main()
