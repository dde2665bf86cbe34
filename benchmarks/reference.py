"""The check against the reference implementation: span 9:11 with the paper's map, and with affine.

``../shared/reference.json`` holds what the reference reaches with the linear map on its draw of 512
images. This prints what blockfit reaches, on several draws: as ``--span 9:11`` does it (fitted on
the images that are not held out, with the default ridge), and by plain least squares (λ = 0), as
the paper does it, on all tokens of several numbers of images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace

from common import MODEL, SHARED, TEST, TRAIN, say

import blockfit
from blockfit.calibrate import calibrate
from blockfit.evaluate import evaluate_many
from blockfit.fit import RIDGE, fit_map
from blockfit.recipes import RECIPES
from blockfit.repair import Options, Solution
from blockfit.session import Session, Setting
from blockfit.spans import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--plain", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--chunk", type=int, default=1000)
    args = parser.parse_args()
    model = blockfit.load(MODEL)
    blocks = blockfit.find_blocks(model)
    rows = {"original": Solution(Plan(), ())}
    for seed in range(args.draws):
        images = blockfit.images(TRAIN, model, limit=args.limit, seed=seed)
        setting = Setting.of(model, images, seed=seed)
        session = Session(setting, replace(RECIPES["default"], options=Options(repair="none")))
        for kind in ("linear", "affine"):
            plan = Plan.of(["9:11"], kind)
            rows[f"{kind}, ridge {RIDGE:g}, draw {seed}"] = session.by_hand(plan).solution
        plan = Plan.of(["9:11"], "linear")
        for count in args.plain:
            moments = calibrate(model, blocks, images.take(count), plan.spans)
            maps = tuple(fit_map(entry, moments, 0.0) for entry in plan)
            rows[f"linear, plain, {count} images, draw {seed}"] = Solution(plan, maps)
        say(f"fitted: draw {seed}")
    test = blockfit.images(TEST, model, limit=args.test_limit)
    right, same, done = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0), 0
    while done < len(test):
        part = replace(test, positions=test.positions[done : done + args.chunk])
        for name, row in evaluate_many(model, blocks, rows, part).items():
            right[name] += (row.top1 or 0) * len(part)
            same[name] += (row.fidelity.agreement or 0) * len(part)
        done += len(part)
        say(f"{done} test images")
    say("\n| row | top-1 | agreement |\n|---|---|---|")
    for name in rows:
        say(f"| {name} | {right[name] / done:.2%} | {same[name] / done:.2%} |")
    reference = json.loads((SHARED / "reference.json").read_text())
    row = next(r for r in reference["rows"] if r["method"] == "linear")
    say(f"| reference, linear | {row['top1']:.2%} | {row['agreement']:.2%} |")
    plain = [f"linear, plain, {count} images" for count in args.plain]
    for start in (f"linear, ridge {RIDGE:g}", f"affine, ridge {RIDGE:g}", *plain):
        mean = statistics.mean(right[n] / done for n in rows if n.startswith(start))
        say(f"mean of {args.draws} draws, {start}: {mean:.2%}")


if __name__ == "__main__":
    main()
