"""What a solution's held-out KL says where it takes over which neurons stay from all images.

Of the same plans: solved on the fit images alone, and with the choices of the solution on all.
"""

from __future__ import annotations

import argparse

import torch
from common import MODEL, TRAIN, say

import blockfit
from blockfit.search.cuts import Share
from blockfit.search.plan_judge import PlanJudge
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting
from blockfit.search.solve import Choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.78, 0.62, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, ratios = blockfit.load(args.model), []
    for seed in range(args.seeds):
        images = blockfit.images(args.images, model, limit=args.limit, seed=seed, batch_size=32)
        recipe = RECIPES["default"]
        session = Session(Setting.of(model, images, seed=seed), recipe, seed=seed)
        judge = PlanJudge(session.originals, session.held_out, recipe.options)
        for size in args.sizes:
            plan, choices = session.cuts.plan(Share("params", size)), Choices()
            alone = judge.solve(plan)
            judge.solve_on_all(plan, choices)
            losses = [session.held_out.score(s).loss for s in (alone, judge.solve(plan, choices))]
            ratios.append(losses[1] / losses[0])
            say(f"seed {seed}, {size:.0%}: KL {losses[0]:.5f} alone, {losses[1]:.5f} taken over")
    say(f"ratio {sum(ratios) / len(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
