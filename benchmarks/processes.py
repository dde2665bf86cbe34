"""One process against two: the same plan, the same moments, and how much faster.

Three ways to compress the same model, in turn: one process with one thread, one process with two
threads, and two processes with one thread each. Say nothing of speed unless both cores are idle.

    python benchmarks/processes.py ../shared/models/dinov2-small-cifar10 \\
        ../shared/data/cifar10/train.parquet --limit 128 --remove 3 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import blockfit
from blockfit import processes as ranks
from blockfit.fit.plan import spans_up_to
from blockfit.models.stages import find_blocks
from blockfit.search.calibrate import calibrate

WAYS = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}


def started(processes: int, threads: int, *arguments: str) -> tuple[str, float, float]:
    """What a command printed, its seconds and those of all its processors."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, seconds, cpu


def moments(model_name: str, images: str, limit: int, file: str) -> None:
    """Calibrate once and write the sums down; run by this script on one and on two processes."""
    with ranks.joined():
        model = blockfit.load(model_name)
        pictures = blockfit.images(images, model, limit=limit)
        blocks = find_blocks(model, next(iter(pictures)))
        found = calibrate(model, blocks, pictures, spans_up_to(blocks.depth, 6))
        if ranks.is_first():
            counts, tensors = found.state()
            save_file({**tensors, "counts": torch.tensor(counts)}, file)


def difference(given: argparse.Namespace) -> float:
    """The largest relative difference of a sum between one process and two."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{count}") for count in (1, 2)]
        for count, file in enumerate(files, 1):
            same = (given.model, given.images, "--limit", str(given.limit))
            started(count, 1, __file__, *same, "--moments", file)
        one, two = map(load_file, files)
    assert torch.equal(one.pop("counts"), two.pop("counts"))
    return max(float((two[k] - one[k]).norm() / one[k].norm()) for k in one if one[k].any())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--remove", default="3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--moments", default="")
    given = parser.parse_args()
    if given.moments:
        moments(given.model, given.images, given.limit, given.moments)
        return
    plans: set[str] = set()
    rows: dict[str, list[Any]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way, (processes, threads) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                said, seconds, cpu = started(
                    processes, threads, "-m", "blockfit", "compress", given.model,
                    "--images", given.images, "--limit", str(given.limit),
                    "--remove", given.remove, "-o", f"{folder}/small", "--json",
                )  # fmt: skip
            told = json.loads(said)
            plans.add(json.dumps(told["plan"]))
            rows[way].append((told["seconds"], seconds, cpu))
            print(way, *(f"{value:.1f}" for value in rows[way][-1]), file=sys.stderr)
    print("| | the command's own seconds | with Python's start | of all processors |")
    print("|---|---|---|---|")
    for way, values in rows.items():
        print(
            f"| {way} | "
            + " | ".join(_spread(column) for column in zip(*values, strict=True))
            + " |"
        )
    print(f"plans: {len(plans)} ({' '.join(plans)})")
    print(
        f"largest relative difference of a sum between 1 and 2 processes: {difference(given):.1e}"
    )


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} – {max(values):.1f})"


if __name__ == "__main__":
    main()
