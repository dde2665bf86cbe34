"""What the search costs beside plain forward passes of the same images, in turn in one process.

Scoring: every span of up to 6 blocks with three kinds of map, on 128 held-out images. Sweep: one
calibration and the best plan for every size, from nothing to finished files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from common import MODEL, TRAIN, say

import blockfit
from blockfit.calibrate import TOKENS_PER_IMAGE, calibrate
from blockfit.candidates import race
from blockfit.data import Images
from blockfit.fit import fit_map
from blockfit.heldout import HeldOut
from blockfit.repair import Solution
from blockfit.session import JUDGE_BATCH
from blockfit.spans import Plan, Replacement, spans_up_to
from blockfit.sweep import loss_of, sweep

KINDS = ("identity", "linear", "affine")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain(model: torch.nn.Module, images: Images) -> None:
    with torch.inference_mode():
        for batch in images:
            model(batch)


def scoring(args: argparse.Namespace, model: torch.nn.Module) -> None:
    blocks = blockfit.find_blocks(model)
    spans = spans_up_to(blocks.depth, 6)
    fit = blockfit.images(args.images, model, limit=args.held_out, seed=1, batch_size=32)
    moments = calibrate(model, blocks, fit, spans, tokens_per_image=TOKENS_PER_IMAGE)
    candidates = []
    for span in spans:
        for kind in KINDS:
            entry = Replacement(span, kind)
            candidates.append(Solution(Plan((entry,)), (fit_map(entry, moments),)))
    images = blockfit.images(
        args.images, model, limit=args.held_out, seed=0, batch_size=JUDGE_BATCH
    )
    plain(model, images)
    before = timed(lambda: plain(model, images))
    held_out = HeldOut(model, blocks, images)
    with torch.inference_mode():
        spent = timed(lambda: race(held_out, candidates))
    after = timed(lambda: plain(model, images))
    say(f"{len(candidates)} candidates on {len(images)} held-out images, batch {JUDGE_BATCH}")
    say(f"plain forward pass: {before:.1f} s before, {after:.1f} s after; scoring: {spent:.1f} s")
    say(f"ratio: {2 * spent / (before + after):.1f} (aim: below 12)")


def whole(args: argparse.Namespace, model: torch.nn.Module) -> None:
    images = blockfit.images(args.images, model, limit=args.limit, seed=0, batch_size=32)
    before = timed(lambda: plain(model, images))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        frontier = sweep(model, images, Path(folder) / "sweep")
        spent = time.perf_counter() - started
    after = timed(lambda: plain(model, images))
    say(f"\nsweep with {len(images)} images")
    say("| removed | plan | held-out KL | seconds |\n|---|---|---|---|")
    for point in frontier.points:
        plan = Plan.from_json(point["plan"])
        say(f"| {point['removed']} | {plan} | {loss_of(point):.4f} | {point['seconds']} |")
    losses = [loss_of(point) for point in frontier.points]
    rising = all(a <= b for a, b in pairwise(losses))
    say(f"no plan loses more than one that removes more: {rising}")
    say(f"plain forward pass: {before:.1f} s before, {after:.1f} s after; sweep: {spent:.1f} s")
    say(f"ratio: {2 * spent / (before + after):.1f} (aim: at most 25)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=128)
    args = parser.parse_args()
    model = blockfit.load(args.model)
    say(f"{torch.get_num_threads()} threads")
    scoring(args, model)
    whole(args, model)


if __name__ == "__main__":
    main()
