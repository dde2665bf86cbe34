"""The check against the reference implementation: span 9:11 with the paper's map, and with affine.

``../shared/reference.json`` holds what the reference reaches with the linear map on its draw of 512
images, and for 57 spans the MSE on those images and the KL of the linear map on 256 others. Its
draw is ``torch.randperm`` with seed 0: the MSEs match to five digits, which no other draw does.

First the MSEs and KLs are compared on that draw, then top-1 on the test images: on the
reference's draw by plain least squares (λ = 0) on all tokens, as the paper does it; and on
blockfit's own draws, as ``--span 9:11`` does it (fitted on the images that are not held out, with
the default ridge), and by plain least squares on several numbers of images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from typing import Any

import torch
from common import MODEL, SHARED, TEST, TRAIN, say

import blockfit
from blockfit.evaluation.paper.judge import Judge
from blockfit.fit.closed_form import RIDGE, fit_map, identity_error
from blockfit.fit.plan import Plan, Span
from blockfit.search.calibrate import calibrate
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting
from blockfit.search.solve import Options, Solution

FIT, HELD_OUT = 512, 256


def their_draw(model: torch.nn.Module) -> torch.Tensor:
    """The order in which the reference draws the training images."""
    count = len(blockfit.images(TRAIN, model))
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def compare(
    model: torch.nn.Module, spans: list[Span], reference: dict[str, Any]
) -> dict[str, Solution]:
    """Print MSE and held-out KL beside the reference's; return the maps of 9:11."""
    blocks, drawn = blockfit.find_blocks(model), their_draw(model).numpy()
    images = blockfit.images(TRAIN, model)
    fit = replace(images, positions=drawn[:FIT])
    held_out = replace(images, positions=drawn[FIT : FIT + HELD_OUT])
    moments = calibrate(model, blocks, fit, spans)
    found = {}
    for span in spans:
        for kind in ("linear", "affine"):
            plan = Plan.of([span], kind)
            solution = Solution(plan, (fit_map(plan.replacements[0], moments, 0.0),))
            found[f"{span} {kind}, plain, the reference's {FIT} images"] = solution
    rows = Judge(model, blocks, held_out).verdicts(found)
    say("| span | MSE | reference | KL of the linear map | reference | KL, affine |")
    say("|---|---|---|---|---|---|")
    theirs = {(row["start"], row["stop"]): row for row in reference["spans"]}
    for span in spans:
        row = theirs[span.start, span.stop]
        mse = identity_error(moments.regression(span)) / blocks.width
        kl = {
            kind: rows[f"{span} {kind}, plain, the reference's {FIT} images"].kl
            for kind in ("linear", "affine")
        }
        say(
            f"| {span} | {mse:.6f} | {row['mse']:.6f} | {kl['linear']:.4f} "
            f"| {row['kl_linear']:.4f} | {kl['affine']:.4f} |"
        )
    return {name: solution for name, solution in found.items() if name.startswith("9:11")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--plain", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--spans", nargs="+", default=["0:1", "1:2", "3:5", "5:7", "9:11", "11:12"])
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--chunk", type=int, default=1000)
    args = parser.parse_args()
    model = blockfit.load(MODEL)
    blocks = blockfit.find_blocks(model)
    reference = json.loads((SHARED / "reference.json").read_text())
    spans = [Span.parse(text) for text in args.spans]
    rows = {"original": Solution(Plan(), ()), **compare(model, spans, reference)}
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
        for name, row in Judge(model, blocks, part).verdicts(rows).items():
            right[name] += row.top1 * len(part)
            same[name] += (row.agreement or 0) * len(part)
        done += len(part)
        say(f"{done} test images")
    say("\n| row | top-1 | agreement |\n|---|---|---|")
    for name in rows:
        say(f"| {name} | {right[name] / done:.2%} | {same[name] / done:.2%} |")
    row = next(r for r in reference["rows"] if r["method"] == "linear")
    say(f"| reference, linear | {row['top1']:.2%} | {row['agreement']:.2%} |")
    plain = [f"linear, plain, {count} images" for count in args.plain]
    for start in (f"linear, ridge {RIDGE:g}", f"affine, ridge {RIDGE:g}", *plain):
        mean = statistics.mean(right[n] / done for n in rows if n.startswith(start))
        say(f"mean of {args.draws} draws, {start}: {mean:.2%}")


if __name__ == "__main__":
    main()
