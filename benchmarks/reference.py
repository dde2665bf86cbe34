"""The check against the reference implementation: span 9:11 with the paper's map, and with affine.

``../shared/reference.json`` holds what the reference reaches with the linear map; this prints what
blockfit reaches with the same number of calibration images, drawn with seed 0.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from common import MODEL, SHARED, TEST, TRAIN, say

import blockfit
from blockfit.evaluate import evaluate_many
from blockfit.recipes import RECIPES
from blockfit.repair import Options, Solution
from blockfit.session import Session, Setting
from blockfit.spans import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--chunk", type=int, default=1000)
    args = parser.parse_args()
    model = blockfit.load(MODEL)
    images = blockfit.images(TRAIN, model, limit=args.limit, seed=0)
    setting = Setting.of(model, images)
    session = Session(setting, replace(RECIPES["default"], options=Options(repair="none")))
    rows = {"original": Solution(Plan(), ())}
    for kind in ("linear", "affine"):
        rows[kind] = session.by_hand(Plan.of(["9:11"], kind)).solution
    del session
    test = blockfit.images(TEST, model, limit=args.test_limit)
    right, done = dict.fromkeys(rows, 0.0), 0
    while done < len(test):
        part = replace(test, positions=test.positions[done : done + args.chunk])
        for name, row in evaluate_many(model, setting.blocks, rows, part).items():
            right[name] += (row.top1 or 0) * len(part)
        done += len(part)
        figures = ", ".join(f"{name} {count / done:.2%}" for name, count in right.items())
        say(f"{done} test images: {figures}")
    reference = json.loads((SHARED / "reference.json").read_text())
    row = next(r for r in reference["rows"] if r["method"] == "linear")
    say(f"reference, linear at 9:11: {row['top1']:.2%}")


if __name__ == "__main__":
    main()
