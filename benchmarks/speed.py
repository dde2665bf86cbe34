"""How much of the speed-up that the FLOPs promise is measured, for 1 to 6 removed blocks.

The same as ``blockfit bench``, without fitting: the weights of the maps do not matter for the time,
so each size removes the plan of blockfit's table in the README.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import MODEL, say

import blockfit
from blockfit.evaluation.bench import bench
from blockfit.evaluation.speed import BATCH_SIZES, Settings
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.models.surgery import apply_plan
from blockfit.reports.bench_page import markdown

PLANS = {
    1: ["1:2"],
    2: ["1:2", "5:6"],
    3: ["0:1", "2:3", "5:6"],
    4: ["0:1", "2:3", "4:5", "6:7"],
    5: ["0:1", "2:3", "4:5", "6:7", "9:10"],
    6: ["0:1", "2:3", "4:5", "6:8", "9:10"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch-size", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--engine", nargs="+", default=["eager"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    model = blockfit.load(args.model)
    blocks = blockfit.find_blocks(model)
    smalls = {}
    for removed, spans in PLANS.items():
        plan = Plan.of(spans, "affine")
        small = copy.deepcopy(model)
        apply_plan(small, blocks, plan, [empty_map(entry, blocks.width) for entry in plan])
        smalls[f"{removed} removed"] = small
    settings = Settings(args.batch_size, args.engine, threads=args.threads, rounds=args.rounds)
    say(markdown(bench(model, smalls, settings, blocks=dict.fromkeys(smalls, blocks), say=say)))


if __name__ == "__main__":
    main()
