"""How much of the speed-up that the FLOPs promise is measured.

The same as ``blockfit bench``, without fitting: weights do not matter for the time. With
``--sweep`` for the plans of a sweep folder (``python benchmarks/narrowing.py --out SWEEP`` writes
one of the same model); without, for 1 to 6 removed blocks as blockfit chooses them.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from common import MODEL, say
from torch import nn

import blockfit
from blockfit.evaluation.bench import bench
from blockfit.evaluation.speed import BATCH_SIZES, Settings
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks
from blockfit.models.surgery import apply_plan
from blockfit.reports.bench_page import markdown
from blockfit.search.sweep import read_sweep as read

PLANS = {
    1: ["1:2"],
    2: ["1:2", "5:6"],
    3: ["0:1", "2:3", "5:6"],
    4: ["0:1", "2:3", "4:5", "6:7"],
    5: ["0:1", "2:3", "4:5", "6:7", "9:10"],
    6: ["0:1", "2:3", "4:5", "6:8", "9:10"],
}


def plans_of(args: argparse.Namespace) -> dict[str, Plan]:
    """The plans to time, by the names of their rows."""
    if args.sweep is None:
        return {f"{count} removed": Plan.of(spans, "affine") for count, spans in PLANS.items()}
    points = {point["share"]: Plan.from_json(point["plan"]) for point in read(args.sweep).points}
    wanted = args.sizes or points
    return {f"{share:.0%}": points[share] for share in points if share in wanted}


def model_of(model: nn.Module, blocks: Blocks, plan: Plan) -> nn.Module:
    """A copy of ``model`` with the shapes that ``plan`` gives it."""
    small = copy.deepcopy(model)
    apply_plan(small, blocks, plan, [empty_map(entry, blocks.width) for entry in plan])
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch-size", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--engine", nargs="+", default=["eager"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", type=Path, help="a sweep folder whose plans are timed")
    parser.add_argument(
        "--sizes", type=float, nargs="+", help="its points, as 0.62; all by default"
    )
    args = parser.parse_args()
    model = blockfit.load(args.model)
    blocks = blockfit.find_blocks(model)
    smalls = {name: model_of(model, blocks, plan) for name, plan in plans_of(args).items()}
    settings = Settings(args.batch_size, args.engine, threads=args.threads, rounds=args.rounds)
    say(markdown(bench(model, smalls, settings, blocks=dict.fromkeys(smalls, blocks), say=say)))


if __name__ == "__main__":
    main()
