"""How much of the speed-up that the FLOPs promise is measured, for 1 to 6 removed blocks.

Original and small model run in turn in one process. The weights of the maps do not matter for the
time, so nothing is fitted: each size removes the plan of blockfit's table in the README.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import MODEL, TRAIN, say

import blockfit
from blockfit.budget import Sizes
from blockfit.maps import empty_map
from blockfit.measure import alternate, speedup
from blockfit.spans import Plan
from blockfit.surgery import apply_plan

PLANS = {
    1: ["2:3"],
    2: ["2:3", "5:6"],
    3: ["0:1", "2:3", "5:6"],
    4: ["0:1", "2:3", "5:6", "9:10"],
    5: ["0:1", "2:4", "7:9"],
    6: ["0:1", "2:4", "6:9"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    model = blockfit.load(args.model)
    blocks = blockfit.find_blocks(model)
    for size in args.batch_size:
        images = blockfit.images(args.images, model, limit=size, batch_size=size)
        batch = next(iter(images))
        sizes = Sizes(model, blocks, batch)
        models = {"original": model}
        promised = {}
        for removed, spans in PLANS.items():
            plan = Plan.of(spans, "affine")
            small = copy.deepcopy(model)
            maps = [empty_map(entry, blocks.width) for entry in plan]
            apply_plan(small, blocks, plan, maps)
            models[str(removed)] = small
            promised[str(removed)] = 1 / sizes.fractions(plan)["flops"]
        times = alternate(models, batch, args.rounds)
        say(f"\nbatch {size}, {torch.get_num_threads()} threads, {args.rounds} rounds in turn")
        say("| removed | plan | promised by FLOPs | measured (median of paired rounds) | part |")
        say("|---|---|---|---|---|")
        for name, promise in promised.items():
            measured = speedup(times["original"], times[name])
            plan_text = ", ".join(PLANS[int(name)])
            say(
                f"| {name} | {plan_text} | {promise:.2f}x | {measured:.2f}x "
                f"| {measured / promise:.0%} |"
            )


if __name__ == "__main__":
    main()
