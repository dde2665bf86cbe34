"""Where the real model and images of the benchmarks lie: in ../shared, or in BLOCKFIT_SHARED."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BLOCKFIT_SHARED") or ROOT.parent / "shared")
MODEL = str(SHARED / "models" / "dinov2-small-cifar10")
TRAIN = str(SHARED / "data" / "cifar10" / "train.parquet")
TEST = str(SHARED / "data" / "cifar10" / "test.parquet")


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)
