"""What narrowing costs, in plain forward passes of the same calibration images, in one process.

Curves and effects of all parts and short spans; one budget from nothing to a saved model; a sweep.
Processor time counts, so that what else runs on the machine does not.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import MODEL, TRAIN, say
from search import plain, timed

import blockfit
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting
from blockfit.search.sweep import POINTS

MEASURES = ["curves", "budget", "sweep"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--params", default="62%")
    parser.add_argument("--points", type=float, nargs="+", default=list(POINTS))
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--out", type=Path, help="a new folder that keeps the sweep")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = blockfit.load(args.model)
    images = blockfit.images(args.images, model, limit=args.limit, seed=0, batch_size=32)
    once = [timed(lambda: plain(model, images))[1]]

    def told(what: str, seconds: float, aim: str) -> None:
        once.append(timed(lambda: plain(model, images))[1])
        passes = seconds / (sum(once[-2:]) / 2)
        say(f"{what}: {seconds:.0f} s of the processor, {passes:.1f} passes ({aim})")

    say(f"plain forward pass of {len(images)} images: {once[0]:.1f} s, one thread")
    if "curves" in args.measure:
        session = Session(Setting.of(model, images), RECIPES["default"])
        told("curves and effects", timed(session.cuts.measure)[1], "aim: at most 8")
        del session
    with tempfile.TemporaryDirectory() as folder:

        def one() -> None:
            small = blockfit.compress(model, images, params=args.params, final=0)
            blockfit.save(small, Path(folder) / "small")

        if "budget" in args.measure:
            told(f"one budget, {args.params}", timed(one)[1], "aim: at most 15")
        if "sweep" in args.measure:
            target = args.out or Path(folder) / "sweep"

            def several() -> None:
                blockfit.sweep(model, images, target, points=args.points, final=0)

            told(f"sweep of {len(args.points)} points", timed(several)[1], "aim: at most 60")


if __name__ == "__main__":
    main()
