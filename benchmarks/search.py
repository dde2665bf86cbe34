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
from blockfit.data.images import Images
from blockfit.fit.closed_form import fit_map
from blockfit.fit.plan import Plan, Replacement, spans_up_to
from blockfit.search.calibrate import TOKENS_PER_IMAGE, calibrate
from blockfit.search.candidates import race
from blockfit.search.held_out import HeldOut
from blockfit.search.setting import JUDGE_BATCH
from blockfit.search.solve import Solution
from blockfit.search.states import TracedImages
from blockfit.search.summaries import loss_of
from blockfit.search.sweep import sweep

KINDS = ("identity", "linear", "affine")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor: what else runs here does not count in these."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def report(
    what: str, before: tuple[float, float], spent: tuple[float, float], after: tuple[float, float],
    aim: str,
) -> None:  # fmt: skip
    for name, i in (("clock", 0), ("processor", 1)):
        say(
            f"{name}: plain forward pass {before[i]:.1f} s before, {after[i]:.1f} s after; "
            f"{what} {spent[i]:.1f} s; ratio {2 * spent[i] / (before[i] + after[i]):.1f} ({aim})"
        )


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
    held_out = HeldOut(TracedImages.everywhere(model, blocks, images))
    with torch.inference_mode():
        spent = timed(lambda: race(held_out, candidates))
    after = timed(lambda: plain(model, images))
    say(f"{len(candidates)} candidates on {len(images)} held-out images, batch {JUDGE_BATCH}")
    report("scoring", before, spent, after, "aim: below 12")


def whole(args: argparse.Namespace, model: torch.nn.Module) -> None:
    images = blockfit.images(args.images, model, limit=args.limit, seed=0, batch_size=32)
    before = timed(lambda: plain(model, images))
    with tempfile.TemporaryDirectory() as folder:
        found = []
        target = Path(folder) / "sweep"
        spent = timed(lambda: found.append(sweep(model, images, target, cuts="blocks")))
        frontier = found[0]
    after = timed(lambda: plain(model, images))
    say(f"\nsweep with {len(images)} images")
    say("| removed | plan | held-out KL | seconds |\n|---|---|---|---|")
    for point in frontier.points:
        plan = Plan.from_json(point["plan"])
        say(f"| {point['removed']} | {plan} | {loss_of(point):.4f} | {point['seconds']} |")
    losses = [loss_of(point) for point in frontier.points]
    rising = all(a <= b for a, b in pairwise(losses))
    say(f"no plan loses more than one that removes more: {rising}")
    report("sweep", before, spent, after, "aim: at most 25")


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
