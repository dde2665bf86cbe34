"""Memory and time of a calibration, by width, by number of images and under --max-memory.

Each row is a process of its own. ``VmHWM`` of Linux is the most memory that it ever held; what the
process holds before the calibration (Python, libraries, the model, one forward) is taken off.

    python benchmarks/memory.py images            # 256 … 10,000 images, flat memory
    python benchmarks/memory.py widths            # ViT-S … ViT-H, random weights, under a limit
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from blockfit.data.images import images as open_images
from blockfit.fit.plan import spans_up_to
from blockfit.models.blocks import Blocks
from blockfit.models.stages import find_blocks
from blockfit.search.calibrate import TOKENS_PER_IMAGE, calibrate
from blockfit.search.spill import MOMENTS_SHARE, groups_of, moments_bytes
from blockfit.units import bytes_of

LONGEST = 6
WIDTHS = {384: (12, 6), 768: (12, 12), 1024: (24, 16), 1280: (32, 16)}
"""Width → depth and heads: ViT-S, ViT-B, ViT-L, ViT-H."""


class Noise:
    """Batches of random pictures, made when they are asked for."""

    def __init__(self, images: int, batch: int, side: int) -> None:
        self.images, self.batch, self.side = images, batch, side

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.images, self.batch):
            generator = torch.Generator().manual_seed(start)
            size = min(self.batch, self.images - start)
            yield torch.randn(size, 3, self.side, self.side, generator=generator)


def vit(width: int, depth: int, heads: int, side: int) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=side, patch_size=16, embed_dim=width, depth=depth, num_heads=heads, num_classes=10
    ).eval()


def memory(name: str) -> int:
    """Bytes that /proc says of this process: VmHWM (most) or VmRSS (now)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def one(width: int, depth: int, heads: int, images: int, side: int, limit: str | None) -> None:
    """Calibrate once and print a row as JSON."""
    torch.set_num_threads(1)
    model = vit(width, depth, heads, side)
    data = open_images(Noise(images, 4 if width > 384 else 16, side))
    blocks: Blocks = find_blocks(model, next(iter(data)))
    spans = spans_up_to(depth, LONGEST)
    with torch.no_grad():
        for batch in [next(iter(data))] * 2:
            model(batch)
    before = memory("VmRSS")
    room = float("inf") if limit is None else MOMENTS_SHARE * bytes_of(limit)
    groups = groups_of(spans, width, room)
    started, cpu = time.perf_counter(), time.process_time()
    for group in groups:
        calibrate(model, blocks, data, group, tokens_per_image=TOKENS_PER_IMAGE)
    row = {
        "width": width,
        "depth": depth,
        "images": images,
        "spans": len(spans),
        "passes": len(groups),
        "sums_all": moments_bytes(depth + 1, len(spans), width),
        "limit": limit,
        "above": memory("VmHWM") - before,
        "peak": memory("VmHWM"),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("images", "widths", "one"))
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--row", default="")
    given = parser.parse_args()
    if given.what == "one":
        one(*json.loads(given.row))
        return
    if given.what == "images":
        rows = [[384, 12, 6, count, 32, None] for count in (256, 1000, 10_000)]
    else:
        rows = [[width, *how, 4, 64, given.limit] for width, how in WIDTHS.items()]
    print(
        "| width | blocks | images | spans | passes | sums of all | peak | above the model | CPU |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        done = subprocess.run(
            [sys.executable, __file__, "one", "--row", json.dumps(row)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
        mb = {name: f"{found[name] / 1e6:,.0f} MB" for name in ("sums_all", "peak", "above")}
        print(
            f"| {found['width']} | {found['depth']} | {found['images']:,} | {found['spans']} "
            f"| {found['passes']} | {mb['sums_all']} | {mb['peak']} | {mb['above']} "
            f"| {found['cpu_seconds']:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
