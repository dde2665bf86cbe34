"""What is lost for what is removed: blockfit, its own spans, the paper and other baselines.

One run, one model, one calibration that all methods share, the same test images for every cell. Run
by ``make bench-quality``: at every size the top-1 (with its 95% interval) and the KL from the
original. A line is printed per finished cell, and all finished cells are kept in ``--out``: a run
that was stopped goes on after them. With other models and images::

    python benchmarks/quality.py --model timm/deit_small_patch16_224 --images TRAIN --data TEST

``--by remove --sizes 1 2 3`` counts blocks instead, ``--by flops`` FLOPs, and ``--by latency``
milliseconds of a batch of ``--batch-size`` images, beside the original in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import MODEL, ROOT, TEST, TRAIN, say

import blockfit
from blockfit.errors import BlockfitError
from blockfit.models.head import observe
from blockfit.progress import silent
from blockfit.search.budget import Budget
from blockfit.search.fidelity import kl_divergence
from blockfit.search.reach import reach
from blockfit.search.recipes import BARE, RECIPES, Recipe
from blockfit.search.session import Session
from blockfit.search.setting import Setting
from blockfit.search.solve import Solution
from blockfit.search.spill import Shelf

RESULTS = ROOT / "benchmarks" / "results"

METHODS: dict[str, Recipe] = {
    "blockfit": RECIPES["default"],
    "spans": replace(RECIPES["default"], cuts=("blocks",)),
    "corp": RECIPES["corp"],
    "vbp": RECIPES["vbp"],
    "magnitude": RECIPES["magnitude"],
    "paper, MSE": RECIPES["paper"],
    "paper, effect": replace(RECIPES["paper"], select="effect"),
    "identity": RECIPES["identity"],
    "folded": Recipe("folded", ("folded",), select="angular", contiguous=True, options=BARE),
}
USUAL = ["blockfit", "spans", "corp", "vbp", "magnitude", "paper, MSE"]

BATCH = 100
KEPT_IN_MEMORY = 2 << 30
"""Bytes of prepared test images; more lie in temporary files."""


class TestSet:
    """Test images, decoded once, and what the original says of them.

    Args:
        source: where they are.
        model: the original.
        limit: the first so many.
    """

    def __init__(self, source: str, model: torch.nn.Module, limit: int) -> None:
        images = blockfit.images(source, model, batch_size=BATCH)
        images = replace(images, positions=images.positions[:limit])
        shelf = Shelf(KEPT_IN_MEMORY)
        self.batches, self.labels = [], []
        for batch in images.batches():
            if batch.labels is None:
                raise SystemExit(f"{source} has no labels; give labelled test images")
            self.batches.append(shelf.hold_batch(batch.inputs))
            self.labels.append(batch.labels)
        self.count = sum(len(labels) for labels in self.labels)

    def logits(self, model: torch.nn.Module, blocks: Any) -> torch.Tensor:
        found = [observe(model, blocks, batch).logits for batch in self.batches]
        return torch.cat([logits for logits in found if logits is not None])

    def figures(self, original: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
        guesses, labels = logits.argmax(1), torch.cat(self.labels)
        right = int((guesses == labels).sum())
        return {
            "top1": right / self.count,
            "interval": wilson(right, self.count),
            "agreement": float((guesses == original.argmax(1)).double().mean()),
            "kl": float(kl_divergence(original, logits).mean()),
        }


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    p, n = right / count, count
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return middle - half, middle + half


def calibrated(args: argparse.Namespace, model: torch.nn.Module) -> Session:
    """One session for all methods, on the images that ``torch.randperm`` draws with the seed."""
    images = blockfit.images(args.images, model, batch_size=args.batch_size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    drawn = replace(images, positions=order[: args.limit].numpy())
    setting = Setting.of(model, drawn, seed=args.seed)
    say(f"original on {len(drawn)} calibration images")
    return Session(setting, RECIPES["default"], seed=args.seed, say=say if args.verbose else silent)


def solved(session: Session, budget: Budget) -> Solution:
    """The plan of a method, solved on all calibration images, those that chose it too."""
    solution = reach(session, budget).solution
    return solution if solution.plan.narrowings else session.cuts.solve(solution.plan)


def cell(session: Session, test: TestSet, original: torch.Tensor, budget: Budget) -> dict[str, Any]:
    """One method at one size; only why, where it cannot reach it."""
    started = time.perf_counter()
    try:
        solution = solved(session, budget)
    except BlockfitError as error:
        return {"refused": str(error)}
    small = copy.deepcopy(session.setting.model)
    solution.apply(small, session.setting.blocks)
    parameters, flops = session.sizes.of(solution.plan)
    seconds = round(time.perf_counter() - started, 1)
    return {
        **test.figures(original, test.logits(small, session.setting.blocks)),
        "parameters": parameters / session.sizes.parameters,
        "flops": None if flops is None else flops / (session.sizes.flops or 1),
        **({"latency": session.latency_ratio(solution)} if budget.kind == "latency" else {}),
        "plan": str(solution.plan),
        "seconds": seconds,
    }


def shown(row: dict[str, Any] | None, size: float | None = None) -> str:
    """A cell of the table; its own size where that is not the one that was asked for."""
    if row is None or "refused" in row:
        return "–"
    text = f"{row['top1']:.2%} / {row['kl']:.4f}"
    if "latency" in row:
        return f"({row['latency']:.0%} of the time, {row['parameters']:.0%}) {text}"
    if size is not None and abs(row["parameters"] - size) > 0.005:
        text = f"({row['parameters']:.0%}) {text}"
    return text


def markdown(table: dict[str, Any]) -> str:
    """The table: sizes down, methods across."""
    settings, rows = table["settings"], table["rows"]
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    first = table["original"]
    low, high = first["interval"]
    lines = [
        f"Original: {first['top1']:.2%} top-1 ({low:.2%} to {high:.2%}) on "
        f"{first['images']:,} test images. Top-1 / KL:",
        "",
        f"| {NAMES[settings['by']]} | " + " | ".join(methods) + " | KL / best other's |",
        "|---|" + "---|" * (len(methods) + 1),
    ]
    for size in sorted({row["size"] for row in rows}, reverse=settings["by"] != "remove"):
        here = {row["method"]: row for row in rows if row["size"] == size}
        at = size / 100 if settings["by"] == "params" else None
        cells = [shown(here.get(method), at) for method in methods]
        others = [r["kl"] for m, r in here.items() if m != "blockfit" and "kl" in r]
        ours = here.get("blockfit", {}).get("kl")
        ratio = f"{ours / min(others):.2f}" if ours is not None and others else ""
        name = f"{size:g}" if settings["by"] == "remove" else f"{size:g}%"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines)


NAMES = {
    "params": "parameters left",
    "flops": "FLOPs left",
    "latency": "latency left",
    "remove": "blocks removed",
}


def opened(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The cells of a run that was stopped; an empty table where there is none."""
    if not path.is_file():
        return {"settings": settings, "original": None, "rows": []}
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if table["settings"] != settings:
        raise SystemExit(f"{path} is of another run ({table['settings']}); name another --out")
    return table


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN, help="to calibrate on")
    parser.add_argument("--data", "--test", dest="data", default=TEST, help="to evaluate on")
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--test-limit", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--by", choices=list(NAMES), default="params")
    parser.add_argument("--sizes", type=float, nargs="+", default=[84, 78, 70, 62, 55, 50])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=USUAL)
    parser.add_argument("-v", "--verbose", action="store_true", help="tell of every step")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    names = ("model", "images", "data", "limit", "test_limit", "seed", "by")
    table = opened(args.out, {name: getattr(args, name) for name in names})
    done = {(row["size"], row["method"]) for row in table["rows"]}
    left = [(s, m) for s in args.sizes for m in args.methods if (s, m) not in done]
    if left:
        model = blockfit.load(args.model)
        session = calibrated(args, model)
        test = TestSet(args.data, model, args.test_limit)
        say(f"original on {test.count} test images")
        original = test.logits(model, session.setting.blocks)
        table["original"] = {"images": test.count, **test.figures(original, original)}
        parts = {method: session.with_recipe(METHODS[method]) for method in args.methods}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for size, method in left:
            budget = Budget(args.by, size if args.by == "remove" else size / 100)
            row = cell(parts[method], test, original, budget)
            table["rows"].append({"size": size, "method": method, **row})
            args.out.write_text(json.dumps(table, indent=1) + "\n")
            interval = " to ".join(f"{end:.2%}" for end in row.get("interval", ()))
            say(f"{size:g} {method}: {shown(row)} [{interval}] {row.get('refused', '')}")
    say(markdown(table))


if __name__ == "__main__":
    main()
