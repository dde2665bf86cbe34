"""What is lost for what is removed: blockfit beside the paper's maps and other ways to drop blocks.

Every row is measured in this run: the same model, the same calibration images, the same split of
them, the same test images. Run by ``make bench-quality``. Figures so far are written to
``benchmarks/results/quality.json`` after every chunk of test images; a run that was stopped goes
on behind the images that are in that file, if it finds the same plans again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import MODEL, ROOT, TEST, TRAIN, say

import blockfit
from blockfit.evaluation.evaluate import evaluate_many
from blockfit.fit.plan import Plan
from blockfit.models.load import load_model
from blockfit.search.budget import Budget
from blockfit.search.recipes import RECIPES, Recipe
from blockfit.search.session import Session, Setting
from blockfit.search.solve import Options, Solution

RESULTS = ROOT / "benchmarks" / "results"
BARE = Options(refit=False, repair="none")

METHODS: dict[str, Recipe] = {
    "paper, MSE": RECIPES["paper"],
    "paper, effect": replace(RECIPES["paper"], select="effect"),
    "identity": Recipe("identity", ("identity",), select="angular", contiguous=True, options=BARE),
    "folded": Recipe("folded", ("folded",), select="angular", contiguous=True, options=BARE),
    "blockfit": RECIPES["default"],
}
"""``identity`` drops the span of smallest angular distance (ShortGPT, UIDL); ``folded`` multiplies
a linear map into the MLP before that span (ReplaceMe)."""


def solutions(args: argparse.Namespace, model: torch.nn.Module) -> tuple[Any, dict[str, Solution]]:
    """Solve every row from the same calibration images."""
    images = blockfit.images(
        args.images, model, limit=args.limit, seed=args.seed, batch_size=args.batch_size
    )
    setting = Setting.of(model, images, seed=args.seed)
    session = Session(setting, RECIPES["default"], seed=args.seed, say=say)
    found: dict[str, Solution] = {}
    for name in args.methods:
        part = session.with_recipe(METHODS[name])
        for removed in args.removed:
            say(f"{name}: {removed} blocks")
            found[f"{removed} {name}"] = part.reach(Budget("remove", removed)).solution
    return session, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--test", default=TEST)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--test-limit", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=500)
    parser.add_argument("--removed", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", default=str(RESULTS / "quality.json"))
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model)
    session, found = solutions(args, model)
    stored = {
        "found": found,
        "sizes": {name: session.sizes.of(s.plan) for name, s in found.items()},
        "whole": (session.sizes.parameters, session.sizes.flops),
        "chunks": [],
    }
    blocks = session.setting.blocks
    del session  # and the cached hidden states with it
    test = blockfit.images(args.test, model, limit=args.test_limit, batch_size=args.batch_size)
    rows = {"0 original": Solution(Plan(), ()), **found}
    if Path(args.out).is_file():
        stored["chunks"].append(earlier(Path(args.out), rows))
    done = sum(chunk["images"] for chunk in stored["chunks"])
    while done < len(test):
        part = replace(test, positions=test.positions[done : done + args.chunk])
        result = evaluate_many(model, blocks, rows, part)
        stored["chunks"].append(
            {
                "images": len(part),
                "rows": {
                    n: (r.top1, r.fidelity.agreement, r.fidelity.kl) for n, r in result.items()
                },
            }
        )
        done += len(part)
        table = json.dumps(summary(stored), indent=1)
        Path(args.out).write_text(table + "\n")
        say(f"{done} of {len(test)} test images")
    say(markdown(summary(stored)))


def earlier(path: Path, rows: dict[str, Solution]) -> dict[str, Any]:
    """The figures of a stopped run, as one chunk."""
    table = json.loads(path.read_text())
    plans = {f"{row['removed']} {row['method']}": row["plan"] for row in table["rows"]}
    if plans != {name: str(s.plan) if len(s.plan) else "" for name, s in rows.items()}:
        raise SystemExit(f"{path} is of other plans; move it away to start anew")
    figures = {
        f"{row['removed']} {row['method']}": (row["top1"], row["agreement"], row["kl"])
        for row in table["rows"]
    }
    return {"images": table["test_images"], "rows": figures}


def summary(stored: dict[str, Any]) -> dict[str, Any]:
    """Means over all test images so far."""
    total = sum(chunk["images"] for chunk in stored["chunks"])
    rows = []
    for name in stored["chunks"][0]["rows"]:
        removed, method = name.split(" ", 1)
        means = [
            sum(c["images"] * c["rows"][name][i] for c in stored["chunks"]) / total
            for i in range(3)
        ]
        parameters, flops = stored["sizes"].get(name, stored["whole"])
        solution = stored["found"].get(name)
        rows.append(
            {
                "removed": int(removed),
                "method": method,
                "top1": means[0],
                "agreement": means[1],
                "kl": means[2],
                "parameters": parameters / stored["whole"][0],
                "flops": flops / stored["whole"][1],
                "plan": str(solution.plan) if solution else "",
            }
        )
    return {"test_images": total, "rows": sorted(rows, key=lambda row: row["removed"])}


def markdown(table: dict[str, Any]) -> str:
    """The table of the README: top-1 and KL, methods side by side."""
    rows = table["rows"]
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    lines = [
        f"Original: {rows[0]['top1']:.2%} top-1 on {table['test_images']:,} test images.",
        "",
        "| removed | parameters | " + " | ".join(methods) + " | KL / best paper's |",
        "|---|---|" + "---|" * (len(methods) + 1),
    ]
    for removed in sorted({r["removed"] for r in rows if r["removed"]}):
        here = {r["method"]: r for r in rows if r["removed"] == removed}
        cells = [f"{here[m]['top1']:.2%} / {here[m]['kl']:.3f}" for m in methods]
        paper = [here[m]["kl"] for m in here if m.startswith("paper")]
        ours = here.get("blockfit")
        ratio = f"{ours['kl'] / min(paper):.2f}" if ours and paper else ""
        size = f"{ours['parameters'] - 1:+.1%}" if ours else ""
        lines.append(f"| {removed} | {size} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
