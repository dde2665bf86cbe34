"""Repeat the main measurement on any model and images: blockfit and baselines at equal sizes.

    python examples/repeat.py --model MODEL --train TRAIN --test TEST -o repeat/

Public ones: --model nateraw/vit-base-patch16-224-cifar10 --train cifar10:train --test cifar10:test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import blockfit

COLUMNS = ("parameters", "recipe", "top-1", "95% interval", "agreement", "KL", "FLOPs")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> None:
    """Compress to every size by every recipe, measure on the test images, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as blockfit.load takes it")
    parser.add_argument("--train", required=True, help="images to calibrate on")
    parser.add_argument("--test", required=True, help="images to measure on, with labels")
    parser.add_argument("--limit", type=int, default=512, help="calibration images")
    parser.add_argument("--test-limit", type=int, help="test images; all by default")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.9, 0.78, 0.62, 0.5, 0.4])
    parser.add_argument("--recipes", nargs="+", default=["default", "corp", "vbp", "magnitude"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True)
    model = blockfit.load(asked.model)
    images = blockfit.images(asked.train, model, limit=asked.limit, seed=asked.seed)
    test = blockfit.images(asked.test, model, limit=asked.test_limit, seed=asked.seed)
    rows, runs = [HEADER], []
    for size in asked.sizes:
        for recipe in asked.recipes:
            name = f"{recipe}-{100 * size:.0f}"
            try:
                small = blockfit.compress(
                    model, images, params=size, recipe=recipe, final=0, seed=asked.seed
                )
            except blockfit.BlockfitError as error:
                print(f"{name}: {error}")
                continue
            worth = blockfit.evaluate(small.model, test, against=model, measure=False)
            told = worth.to_json()
            file = asked.output / f"{name}.json"
            file.write_text(json.dumps(told), encoding="utf-8")
            blockfit.save(small, asked.output / name)
            runs += [asked.output / name, file]
            rows.append(row(told, recipe))
            print(rows[-1])
    (asked.output / "table.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    blockfit.report(runs, asked.output / "report.html")
    print(f"table in {asked.output / 'table.md'}, report in {asked.output / 'report.html'}")


def row(told: dict[str, Any], recipe: str) -> str:
    """One line of the table, from an evaluation's JSON."""
    before, after = told["original"], told["compressed"]
    top1, flops = told["intervals"]["top1_after"], after["flops"]
    accuracy = ("–", "–")
    if top1 is not None:
        accuracy = (f"{top1['value']:.2%}", f"{top1['low']:.2%} to {top1['high']:.2%}")
    agreement, kl = told["fidelity"]["agreement"], told["fidelity"]["kl"]
    cells = [
        f"{after['parameters'] / before['parameters']:.1%}", recipe, *accuracy,
        "–" if agreement is None else f"{agreement:.2%}",
        "–" if kl is None else f"{kl:.4f}",
        "–" if flops is None else f"{flops / before['flops']:.1%}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
