"""Does a budget in points of top-1 hold? Many draws of calibration images, one budget, one truth.

Of every draw, 512 of the training images calibrate, others judge the budget, others give the final
figures; the truth is the drop on test images that the run never sees. What was measured is kept in
``--cache``: a run that was stopped goes on, and more draws can be added later. ``drop`` is what the
final figures say, with their interval; ``test`` is the truth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import MODEL, TEST, TRAIN, say
from torch import Tensor, nn

import blockfit
from blockfit.data.images import Images

HEAD = "| draw | plan | parameters | judged on | judged | bound | drop (interval) | test |"


def right_answers(model: nn.Module, images: Images) -> Tensor:
    """Whether the model's own head is right, for every image."""
    found = []
    for batch in images.batches():
        output = model(batch.inputs)
        guesses = getattr(output, "logits", output).argmax(1)
        assert batch.labels is not None
        found.append(guesses == batch.labels)
    return torch.cat(found)


def one_draw(args: argparse.Namespace, seed: int, model: nn.Module, test: Images) -> dict[str, Any]:
    """What a run with this seed says, and what its model does on the test images."""
    file = Path(args.cache) / f"{args.max_drop:g}-{args.limit}-{seed}.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    found: dict[str, Any] = {"seed": seed}
    pictures = blockfit.images(args.images, model, limit=args.limit, seed=seed)
    try:
        result = blockfit.compress(model, pictures, max_drop=args.max_drop, seed=seed)
    except blockfit.BlockfitError as error:
        found["refused"] = str(error)
    else:
        report = result.report
        found |= {key: report[key] for key in ("judged", "final", "seconds", "removed_blocks")}
        found["plan"] = str(result.plan)
        found["parameters"] = report["parameters_after"] / report["parameters_before"]
        found["right"] = int(right_answers(result.model, test).sum())
    file.write_text(json.dumps(found))
    return found


def original_right(args: argparse.Namespace, model: nn.Module, test: Images) -> int:
    """Right answers of the original on the test images."""
    file = Path(args.cache) / f"original-{len(test)}.json"
    if not file.exists():
        file.write_text(json.dumps(int(right_answers(model, test).sum())))
    return int(json.loads(file.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--test", default=TEST)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--test-limit", type=int, default=10_000)
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--cache", default="budget-in-points")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    Path(args.cache).mkdir(parents=True, exist_ok=True)
    model = blockfit.load(args.model)
    test = blockfit.images(args.test, model, limit=args.test_limit, batch_size=64)
    before = original_right(args, model, test)
    say(f"original: {before / len(test):.2%} of {len(test)} test images\n\n{HEAD}\n|{'---|' * 8}")
    over = inside = refused = 0
    sizes = []
    for seed in range(args.first, args.first + args.draws):
        found = one_draw(args, seed, model, test)
        if "refused" in found:
            refused += 1
            say(f"| {seed} | refused: {found['refused']} |")
            continue
        truth = 100 * (before - found["right"]) / len(test)
        drop, judged = found["final"]["drop"], found["judged"]
        over += truth > args.max_drop
        inside += drop["low"] <= truth <= drop["high"]
        sizes.append(found["parameters"])
        say(
            f"| {seed} | {found['plan']} | {found['parameters']:.1%} | {judged['images']} | "
            f"{judged['value']:.2f} | {judged['bound']:.2f} | {drop['value']:.2f} "
            f"({drop['low']:.2f} to {drop['high']:.2f}) | {truth:.2f} |"
        )
    done = len(sizes)
    say(
        f"\n{done} draws, {refused} refused; the drop on the test images is above "
        f"{args.max_drop:g} in {over}; the printed interval holds it in {inside}; parameters left: "
        f"{sum(sizes) / max(done, 1):.1%} on average"
    )


if __name__ == "__main__":
    main()
