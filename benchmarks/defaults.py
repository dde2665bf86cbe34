"""Why the defaults are what they are: one option changed at a time, on one fixed plan.

Each row solves the plan again with one option changed and reports top-1 and KL against the
original on test images that are used for nothing else. ``narrowing`` does the same with the plan
that leaves ``--params`` of the parameters; ``effects`` chooses it by the KL of softer and harder
softmaxes. ``images`` changes the number of calibration images,
``seeds`` the draw of them; both with the search that chooses the plan, of ``--removed`` blocks or
``--params``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from common import MODEL, TEST, TRAIN, say

import blockfit
from blockfit.data.images import Images
from blockfit.evaluation.paper.judge import Judge
from blockfit.fit.closed_form import RIDGE, fit_map
from blockfit.fit.plan import Plan, Replacement
from blockfit.models.blocks import Blocks
from blockfit.search import tokens as drawing
from blockfit.search.budget import Budget
from blockfit.search.calibrate import calibrate
from blockfit.search.cuts import Share
from blockfit.search.reach import reach
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting
from blockfit.search.solve import Options, Solution, solve
from blockfit.search.states import TracedImages
from blockfit.search.tokens import NARROW_ROWS_PER_INPUT

SPANS = ["0:1", "2:3", "5:6"]
"""The plan that blockfit finds for three blocks with 512 images drawn with seed 0."""


def variants(width: int, spans: list[str]) -> Iterator[tuple[str, Plan, Options]]:
    """One option changed at a time."""
    default, plan = Options(), Plan.of(spans, "affine")
    yield "default", plan, default
    yield "no refit, no repair", plan, Options(refit=False, repair="none")
    yield "refit, no repair", plan, Options(repair="none")
    yield "refit, repair mlp", plan, Options(repair="mlp")
    for ridge in (0.0, 1e-6, 1e-2, 1e-1, None):
        name = "auto" if ridge is None else f"{ridge:g}"
        yield f"ridge of maps {name} (default {RIDGE:g})", plan, replace(default, ridge=ridge)
    for ridge in (0.1, 0.3, 1.0, 3.0, 10.0):
        if ridge == default.repair_ridge:
            continue
        yield f"ridge of repairs {ridge:g}", plan, replace(default, repair_ridge=ridge)
    for weight in (0.2, 5.0, 25.0):
        yield f"prefix tokens weigh {weight:g}", plan, replace(default, prefix_weight=weight)
    split = Plan(tuple(Replacement(e.span, "affine", None, True) for e in plan))
    yield "one map per token type", split, default
    for kind in ("identity", "scale", "orthogonal", "linear"):
        yield f"map {kind}", Plan.of(spans, kind), default
    for rank in (width // 8, width // 4, width // 2):
        yield f"map low-rank {rank}", Plan.of(spans, "low-rank", rank=rank), default


def by_option(args: argparse.Namespace, model: Any, blocks: Blocks) -> dict[str, Solution]:
    images = calibration(args, model, args.limit, 0)
    originals = TracedImages.of(model, blocks, images)
    found = {}
    for name, plan, options in variants(blocks.width, args.spans):
        if args.only not in name and name != "default":
            continue
        found[name] = solve(originals, plan, options)
        say(f"solved: {name}")
    if args.only:
        return found
    for rows in (2, 4, 12, 100):
        before, drawing.ROWS_PER_INPUT = drawing.ROWS_PER_INPUT, rows
        found[f"repairs from {rows} tokens per input (default {before})"] = solve(
            originals, Plan.of(args.spans, "affine")
        )
        drawing.ROWS_PER_INPUT = before
    for tokens in (4, 8, 16, 32, None):
        moments = calibrate(
            model, blocks, images, Plan.of(args.spans, "affine").spans, tokens_per_image=tokens
        )
        plan = Plan.of(["2:3"], "affine")
        maps = tuple(fit_map(entry, moments) for entry in plan)
        found[f"span 2:3 alone, {tokens or 'all'} patch tokens per image"] = Solution(plan, maps)
    return found


def by_narrowing(args: argparse.Namespace, model: Any) -> dict[str, Solution]:
    """The plan of one budget, solved with one option changed at a time."""
    setting = Setting.of(model, calibration(args, model, args.limit, 0))
    session = Session(setting, RECIPES["default"])
    cuts, usual = session.cuts, RECIPES["default"].options
    plan = cuts.plan(Share("params", args.params or 0.62))
    every = session.originals.with_more(session.held_out.images)
    found = {"default": solve(every, plan, usual)}
    found["the fit images alone"] = solve(session.originals, plan, usual)
    found["untouched parts not repaired"] = solve(every, plan, replace(usual, repair="none"))
    for ridge in (0.03, 0.1, 0.3, 1.0, 3.0):
        if ridge != usual.narrow_ridge:
            options = replace(usual, narrow_ridge=ridge)
            found[f"ridge of narrowed parts {ridge:g}"] = solve(every, plan, options)
        say(f"solved: ridge {ridge:g}")
    for rows in (6, 16):
        name = f"{rows} tokens per input (default {NARROW_ROWS_PER_INPUT})"
        with mock.patch("blockfit.search.solve.NARROW_ROWS_PER_INPUT", rows):
            found[name] = solve(every, plan, usual)
        say(f"solved: {rows} tokens per input")
    return found


def by_effects(args: argparse.Namespace, model: Any) -> dict[str, Solution]:
    """Plans chosen by the KL of softmaxes of several temperatures, of several draws of images."""
    found = {}
    for seed in range(args.draws):
        setting = Setting.of(model, calibration(args, model, args.limit, seed), seed=seed)
        session = Session(setting, RECIPES["default"], seed=seed)
        for temperature in args.temperatures:
            with mock.patch("blockfit.search.fidelity.SOFT", temperature):
                cuts = session.with_recipe(RECIPES["default"]).cuts
                plan = cuts.plan(Share("params", args.params or 0.62))
            found[f"draw {seed}, temperature {temperature:g}"] = cuts.solve(plan)
            say(f"solved: draw {seed}, temperature {temperature:g}: {plan}")
    return found


def budget_of(args: argparse.Namespace) -> Budget:
    """Blocks, or a part of the parameters where one is given."""
    return Budget("remove", args.removed) if args.params is None else Budget("params", args.params)


def by_images(args: argparse.Namespace, model: Any) -> dict[str, Solution]:
    found = {}
    for count in args.counts:
        setting = Setting.of(model, calibration(args, model, count, 0))
        session = Session(setting, RECIPES["default"])
        best = reach(session, budget_of(args)).solution
        found[f"{count} images, default"] = best
        say(f"solved: {count} images")
        if args.params is not None:
            continue
        bare = Options(ridge=0.0, repair_ridge=0.0)
        found[f"{count} images, default without ridges"] = solve(session.originals, best.plan, bare)
        paper = session.with_recipe(RECIPES["paper"])
        found[f"{count} images, paper"] = reach(paper, budget_of(args)).solution
    return found


def by_seed(args: argparse.Namespace, model: Any) -> dict[str, Solution]:
    found = {}
    for seed in range(args.draws):
        setting = Setting.of(model, calibration(args, model, args.limit, seed), seed=seed)
        session = Session(setting, RECIPES["default"], seed=seed)
        point = reach(session, budget_of(args))
        found[f"seed {seed}: {point.solution.plan}"] = point.solution
        say(f"solved: seed {seed}")
    return found


def calibration(args: argparse.Namespace, model: Any, count: int, seed: int) -> Images:
    return blockfit.images(args.images, model, limit=count, seed=seed, batch_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["options", "narrowing", "effects", "images", "seeds"])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--test", default=TEST)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--test-limit", type=int, default=1000)
    parser.add_argument("--spans", nargs="+", default=SPANS)
    parser.add_argument("--only", default="", help="of the options, those whose name holds this")
    parser.add_argument("--removed", type=int, default=3)
    parser.add_argument("--params", type=float, help="0.62: parts are narrowed, no block count")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1, 2, 4])
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 64, 128, 256, 512, 2048])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = blockfit.load(args.model)
    blocks = blockfit.find_blocks(model)
    if args.what == "options":
        found = by_option(args, model, blocks)
    elif args.what == "narrowing":
        found = by_narrowing(args, model)
    elif args.what == "effects":
        found = by_effects(args, model)
    elif args.what == "images":
        found = by_images(args, model)
    else:
        found = by_seed(args, model)
    test = blockfit.images(args.test, model, limit=args.test_limit, seed=0)
    rows = Judge(model, blocks, test).verdicts({"original": Solution(Plan(), ()), **found})
    say(f"\n{len(test)} test images\n\n| variant | top-1 | KL |\n|---|---|---|")
    for name, row in rows.items():
        say(f"| {name} | {row.top1:.2%} | {row.kl:.4f} |")
    if args.what == "seeds":
        tops = [100 * rows[name].top1 for name in found]
        say(f"\nstandard deviation of top-1 over {len(tops)} draws: {statistics.stdev(tops):.2f}")


if __name__ == "__main__":
    main()
