"""What the calibration pass costs beside a plain forward pass of the same images.

Time: plain pass and calibration in turn, in one process, as a ratio. Memory: the peak resident
size of a process that calibrates on few and on many images, above its size with the model loaded
and run once (read from ``/proc``, so on Linux only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import MODEL, TRAIN, say

import blockfit
from blockfit.fit.plan import spans_up_to
from blockfit.search.calibrate import TOKENS_PER_IMAGE, calibrate


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` the most since the last reset."""
    line = next(s for s in Path("/proc/self/status").read_text("utf-8").splitlines() if field in s)
    return 1024 * int(line.split()[1])


def peak_above_model(args: argparse.Namespace, count: int) -> int:
    """Peak resident bytes of a fresh process that calibrates, above those before it does."""
    command = [sys.executable, __file__, "--child", str(count), "--model", args.model]
    command += ["--images", args.images, "--batch-size", str(args.batch_size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def child(args: argparse.Namespace) -> None:
    model = blockfit.load(args.model)
    images = blockfit.images(
        args.images, model, limit=args.child, seed=0, batch_size=args.batch_size
    )
    blocks = blockfit.find_blocks(model)
    with torch.inference_mode():
        model(next(iter(images)))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM counts from here
    before = resident("VmRSS")
    spans = spans_up_to(blocks.depth, args.longest)
    calibrate(model, blocks, images, spans, tokens_per_image=TOKENS_PER_IMAGE)
    say(json.dumps({"bytes": resident("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--memory", type=int, nargs="*", default=[256, 2048])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    model = blockfit.load(args.model)
    images = blockfit.images(args.images, model, limit=args.limit, batch_size=args.batch_size)
    blocks = blockfit.find_blocks(model)
    spans = spans_up_to(blocks.depth, args.longest)

    def plain() -> None:
        with torch.inference_mode():
            for batch in images:
                model(batch)

    def full() -> None:
        calibrate(model, blocks, images, spans, tokens_per_image=TOKENS_PER_IMAGE)

    plain()
    rounds = [(timed(plain), timed(full)) for _ in range(args.rounds)]
    ratios = [b / a for a, b in rounds]
    say(f"{args.limit} images, {len(spans)} spans, {torch.get_num_threads()} threads")
    say(f"plain forward pass: median {statistics.median(a for a, _ in rounds):.1f} s")
    say(f"calibration:        median {statistics.median(b for _, b in rounds):.1f} s")
    say(
        f"ratio: median {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f}; aim: at most 1.6)"
    )
    peaks = {count: peak_above_model(args, count) for count in args.memory}
    for count, size in peaks.items():
        say(f"peak memory above the model, {count} images: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
