"""Plain checkpoints of the real model, as transformers alone loads them: size, top-1, KL.

    python benchmarks/plain.py --params 84 68 62 --test-limit 200

For every size: compress with the recipe ``plain``, write the stock checkpoint, load it with
transformers, and run it beside the original on the same test images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import transformers
from common import MODEL, TEST, TRAIN, say

import blockfit
from blockfit.evaluation.evaluate import evaluate
from blockfit.models.load import load_model, source_of
from blockfit.search.budget import Budget
from blockfit.search.reach import reach
from blockfit.search.recipes import named_recipe
from blockfit.search.run import Result
from blockfit.search.session import Session
from blockfit.search.setting import Setting


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--params", type=float, nargs="+", default=[84, 68, 62], help="percent")
    parser.add_argument("--limit", type=int, default=512, help="calibration images")
    parser.add_argument("--test-limit", type=int, default=10_000, help="test images")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--test", default=TEST)
    args = parser.parse_args()
    original = load_model(args.model)
    images = blockfit.images(args.images, original, limit=args.limit, batch_size=64)
    test = blockfit.images(args.test, original, limit=args.test_limit, batch_size=64)
    setting = Setting.of(original, images)
    session = Session(setting, named_recipe("plain"), say=say)
    say(f"| params asked | left | plan | top-1 of {len(test)} | original | KL |")
    say("|---|---|---|---|---|---|")
    for percent in args.params:
        point = reach(session, Budget("params", percent / 100))
        small = load_model(args.model)
        point.solution.apply(small, setting.blocks)
        plan, source = point.solution.plan, source_of(small)
        result = Result(small, plan, {}, setting.blocks, source)
        with tempfile.TemporaryDirectory() as folder:
            done = blockfit.export_plain(result, Path(folder) / "plain")
            stock = getattr(transformers, type(small).__name__).from_pretrained(done.folder)
            worth = evaluate(stock.float().eval(), test, against=original, measure=False).to_json()
        left = done.parameters / session.sizes.parameters
        widths = plan.mlp_width(setting.blocks.depth)
        told = f"MLPs {widths[1]} of {widths[0]}" if widths else "MLPs whole"
        told += "".join(f", {entry}" for entry in plan)
        top1, before = (worth[which]["top1"] for which in ("compressed", "original"))
        kl = worth["fidelity"]["kl"]
        say(f"| {percent:g}% | {left:.1%} | {told} | {top1:.2%} | {before:.2%} | {kl:.4f} |")


if __name__ == "__main__":
    main()
