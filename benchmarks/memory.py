"""Memory and time of a calibration and of narrowing, by width, by number of images, under a limit.

Each row is a process of its own. ``VmHWM`` of Linux is the most memory that it ever held; what the
process holds before the calibration (Python, libraries, the model, one forward) is taken off. It
counts pages of temporary files that were read, which the system drops where memory is short; what
it cannot drop ("of its own", RssAnon) is looked at twenty times a second.

    python benchmarks/memory.py images            # 256 … 10,000 images, flat memory
    python benchmarks/memory.py widths            # ViT-S … ViT-g, random weights, under a limit
    python benchmarks/memory.py narrow            # the same, each narrowed to 62% of its parameters
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import blockfit
from blockfit.data.images import Images
from blockfit.data.images import images as open_images
from blockfit.fit.plan import spans_up_to
from blockfit.models.blocks import Blocks
from blockfit.models.stages import find_blocks
from blockfit.search.calibrate import TOKENS_PER_IMAGE, calibrate
from blockfit.search.spill import MOMENTS_SHARE, groups_of, moments_bytes
from blockfit.units import bytes_of

LONGEST = 6
SHARE = 0.62
WIDTHS = {
    384: (12, 6, 4.0), 768: (12, 12, 4.0), 1024: (24, 16, 4.0), 1280: (32, 16, 4.0),
    1408: (40, 16, 48 / 11),
}  # fmt: skip
"""Width → depth, heads and MLP's width by the model's: ViT-S, ViT-B, ViT-L, ViT-H, ViT-g."""


class Noise:
    """Batches of random pictures, made when they are asked for."""

    def __init__(self, images: int, batch: int, side: int) -> None:
        self.images, self.batch, self.side = images, batch, side

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.images, self.batch):
            generator = torch.Generator().manual_seed(start)
            size = min(self.batch, self.images - start)
            yield torch.randn(size, 3, self.side, self.side, generator=generator)


def vit(width: int, depth: int, heads: int, ratio: float, side: int) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=side, patch_size=16, embed_dim=width, depth=depth, num_heads=heads,
        mlp_ratio=ratio, num_classes=10,
    ).eval()  # fmt: skip


def memory(name: str) -> int:
    """Bytes that /proc says of this process: VmHWM (most), VmRSS (now) or RssAnon (no files)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def started_with(
    width: int, depth: int, heads: int, ratio: float, images: int, side: int
) -> tuple[torch.nn.Module, Images, float]:
    """The model, its images, and the processor time of one plain pass over them."""
    torch.set_num_threads(1)
    model = vit(width, depth, heads, ratio, side)
    data = open_images(Noise(images, 4 if width > 384 else 16, side))
    with torch.no_grad():
        for batch in [next(iter(data))] * 2:
            model(batch)
        begun = time.process_time()
        for batch in data:
            model(batch)
    return model, data, time.process_time() - begun


def calibrated(*row: Any, limit: str | None) -> dict[str, Any]:
    """Calibrate once, all spans of up to six blocks."""
    model, data, plain = started_with(*row)
    blocks: Blocks = find_blocks(model, next(iter(data)))
    spans = spans_up_to(blocks.depth, LONGEST)
    watch = Watch()
    room = float("inf") if limit is None else MOMENTS_SHARE * bytes_of(limit)
    groups = groups_of(spans, blocks.width, room)
    for group in groups:
        calibrate(model, blocks, data, group, tokens_per_image=TOKENS_PER_IMAGE)
    sums = moments_bytes(blocks.depth + 1, len(spans), blocks.width)
    return {
        "spans": f"{len(spans)}",
        "passes": f"{len(groups)}",
        "sums of all": f"{sums / 1e6:,.0f} MB",
        **used(watch, plain),
    }


def narrowed(*row: Any, limit: str | None) -> dict[str, Any]:
    """Narrow to ``SHARE`` of the parameters, in place, from nothing to the small model.

    Every image is shown once: more views take time, and lie where the other hidden states lie.
    """
    model, data, plain = started_with(*row)
    weights = sum(4 * p.numel() for p in model.parameters())
    watch = Watch()
    how: dict[str, Any] = {"params": SHARE, "max_memory": limit, "views": 1, "inplace": True}
    found = blockfit.compress(model, data, **how).report
    return {
        "weights": f"{weights / 1e6:,.0f} MB",
        "left": f"{found['parameters_after'] / found['parameters_before']:.1%}",
        **used(watch, plain),
    }


class Watch:
    """What a process has of its own, above what it had when it was begun to watch."""

    def __init__(self) -> None:
        self.resident, self._own, self._most = memory("VmRSS"), memory("RssAnon"), 0
        self.begun = time.process_time()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._most = max(self._most, memory("RssAnon"))
            time.sleep(0.05)

    def above(self) -> int:
        """Bytes."""
        return self._most - self._own


def used(watch: Watch, plain: float) -> dict[str, str]:
    """What a run held at most, and what it took."""
    seconds = time.process_time() - watch.begun
    return {
        "peak": f"{memory('VmHWM') / 1e6:,.0f} MB",
        "above the model": f"{(memory('VmHWM') - watch.resident) / 1e6:,.0f} MB",
        "of its own": f"{watch.above() / 1e6:,.0f} MB",
        "CPU": f"{seconds:.0f} s",
        "plain passes": f"{seconds / plain:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("images", "widths", "narrow", "one"))
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--images", type=int, help="4 for widths, 64 for narrow")
    parser.add_argument("--only", type=int, nargs="+", default=list(WIDTHS), help="widths")
    parser.add_argument("--row", default="")
    given = parser.parse_args()
    if given.what == "one":
        what, row, limit = json.loads(given.row)
        print(json.dumps((narrowed if what == "narrow" else calibrated)(*row, limit=limit)))
        return
    if given.what == "images":
        rows = [[384, *WIDTHS[384], count, 32] for count in (256, 1000, 10_000)]
    else:
        count = given.images or (4 if given.what == "widths" else 64)
        rows = [[width, *WIDTHS[width], count, 64] for width in given.only]
    limit = None if given.what == "images" else given.limit
    for number, row in enumerate(rows):
        done = subprocess.run(
            [sys.executable, __file__, "one", "--row", json.dumps([given.what, row, limit])],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        cells = {
            "width": f"{row[0]:,}", "blocks": str(row[1]), "images": f"{row[4]:,}",
            **json.loads(done.stdout.splitlines()[-1]),
        }  # fmt: skip
        if number == 0:
            print(f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}")
        print(f"| {' | '.join(cells.values())} |", flush=True)


if __name__ == "__main__":
    main()
