"""What an accelerator gives, on one page: cost, parity of plans with the CPU, speed.

    python benchmarks/device.py --model timm/vit_base_patch16_224.augreg_in1k --images PHOTOS \\
        -o device.md

Run it once on a machine with CUDA or MPS. It compresses on the CPU and on the accelerator from the
same images, and times original and small model in turn, per dtype and batch size. Seconds are of
the clock, with every device waited for. With ``--device cpu`` both halves are the CPU, which shows
how far two runs of the same kind agree.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import MODEL, TRAIN, say
from torch import Tensor, nn

import blockfit
from blockfit.evaluation.bench import bench
from blockfit.evaluation.speed import Settings
from blockfit.models.cost import device_name, wait
from blockfit.models.forward import Batch, call, evaluating, placed
from blockfit.models.head import primary_output
from blockfit.reports.bench_page import markdown


@dataclass(frozen=True)
class Run:
    """One budget on one device.

    Args:
        device: its name.
        plain: seconds of a forward pass over the calibration images.
        seconds: from nothing to the small model.
        result: with the model, moved to the CPU.
    """

    device: torch.device
    plain: float
    seconds: float
    result: Any


def passed(model: nn.Module, images: Any, device: torch.device) -> float:
    """Seconds of one pass over the images; the second, for the first warms up."""
    for _ in range(2):
        wait(device)
        started = time.perf_counter()
        with evaluating(model), torch.no_grad():
            for batch in images:
                call(model, placed(model, batch))
        wait(device)
        seconds = time.perf_counter() - started
    return seconds


def run(original: nn.Module, args: argparse.Namespace, device: torch.device) -> Run:
    """Compress a copy of the model on the device."""
    model = copy.deepcopy(original).to(device)
    images = blockfit.images(
        args.images, model, limit=args.limit, seed=args.seed, batch_size=args.batch
    )
    plain = passed(model, images, device)
    say(f"{device}: a plain pass over {len(images)} images takes {plain:.1f} s")
    started = time.perf_counter()
    result = blockfit.compress(model, images, params=args.params, seed=args.seed)
    wait(device)
    seconds = time.perf_counter() - started
    say(f"{device}: {args.params:.0%} of the parameters took {seconds:.1f} s")
    result.model.cpu()
    return Run(device, plain, seconds, result)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    with evaluating(model), torch.no_grad():
        return primary_output(call(model, batch)).float()


def parity(original: nn.Module, batch: Batch, cpu: Run, other: Run) -> list[str]:
    """Whether both found the same plan, and how far the small models' outputs are apart."""
    exact, first, second = (
        outputs(model, batch) for model in (original, cpu.result.model, other.result.model)
    )
    apart = float((first - second).norm() / exact.norm())
    lost = float((first - exact).norm() / exact.norm())
    same = cpu.result.plan == other.result.plan
    kept = [cut.kept == twin.kept for cut, twin in both_cuts(cpu, other)]
    alike = f"; {sum(kept)} of {len(kept)} narrowed parts keep as many dimensions"
    return [
        f"- Plan: {'the same' if same else 'another' + alike}.",
        f"- Outputs of the two small models on {len(exact)} images differ by {apart:.2%} of the "
        f"original's norm, where the first differs from the original by {lost:.1%}.",
    ]


def both_cuts(cpu: Run, other: Run) -> list[tuple[Any, Any]]:
    """The parts that both plans narrow."""
    found = {(cut.block, cut.part): cut for cut in other.result.plan.narrowings}
    own = cpu.result.plan.narrowings
    return [(c, found[c.block, c.part]) for c in own if (c.block, c.part) in found]


def page(args: argparse.Namespace, runs: Sequence[Run], lines: Sequence[str], speed: str) -> str:
    """The page, in Markdown."""
    device = runs[-1].device
    rows = [
        f"| {run.device} | {run.plain:.1f} | {run.seconds:.1f} | {run.seconds / run.plain:.1f} |"
        for run in runs
    ]
    return f"""# {args.model} on {device}

{device_name(device)}; torch {torch.__version__}, {platform.platform()}

{args.limit} calibration images, seed {args.seed}, {args.params:.0%} of the parameters.

| device | plain pass, s | one budget, s | in passes |
|---|---|---|---|
{chr(10).join(rows)}

{chr(10).join(lines)}

## Speed

{speed}
"""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN, help="to calibrate on")
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--params", type=float, default=0.62)
    parser.add_argument("--batch", type=int, default=32, help="images per calibration batch")
    parser.add_argument("--device", help="cuda, mps or cpu; the accelerator that is there")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--engines", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("-o", "--output", type=Path, help="a page to write; printed in any case")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    chosen = args.device or ("cuda" if torch.cuda.is_available() else "mps")
    if chosen == "mps" and not torch.backends.mps.is_available():
        raise SystemExit("there is no accelerator here; give --device cpu to see the page anyway")
    if args.output is not None and args.output.exists():
        raise SystemExit(f"{args.output} is there already; name another file")
    original = blockfit.load(args.model)
    runs = [run(original, args, torch.device(name)) for name in ("cpu", chosen)]
    batch = next(iter(blockfit.images(args.images, original, limit=args.limit, batch_size=64)))
    lines = parity(original, batch, *runs)
    settings = Settings(
        args.batch_sizes, args.engines, args.dtypes, device=chosen, rounds=args.rounds
    )
    small = runs[1].result
    name = f"{args.params:.0%}"
    found = bench(original, {name: small.model}, settings, blocks={name: small.blocks}, say=say)
    text = page(args, runs, lines, markdown(found))
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
