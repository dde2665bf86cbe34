"""Small pictures, folders and tables of them, and how to look at what comes out of ``Images``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from blockfit.data.images import Images
from blockfit.models.preprocessing import Preprocessing

PIXELS = Preprocessing.plain(8, mean=[0] * 3, std=[1] * 3, interpolation="nearest")
"""8 × 8 pixels as they are, in [0, 1]."""


def grey(level: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (level, level, level))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def folder_of(folder: Path, count: int) -> Path:
    """``count`` pictures whose grey level is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(encoded(grey(i)))
    return folder


def levels(data: Images) -> list[int]:
    """The grey level of every image, in the order of the walk."""
    found = [b.inputs for b in data.batches()]
    whole = torch.cat([x if isinstance(x, Tensor) else x["pixel_values"] for x in found])
    return [round(v) for v in (whole[:, 0, 0, 0] * 255).tolist()]


def labels(data: Images) -> list[int] | None:
    found = [batch.labels for batch in data.batches()]
    if any(part is None for part in found):
        return None
    return torch.cat([part for part in found if part is not None]).tolist()


def spoil(folder: Path, *numbers: int) -> None:
    for number in numbers:
        file = folder / f"{number:03d}.png"
        file.write_bytes(file.read_bytes()[:30])


def stack(count: int) -> Tensor:
    """Prepared images whose grey level is their number."""
    return (torch.arange(count) / 255).view(-1, 1, 1, 1).expand(count, 3, 2, 2).contiguous()


def table(count: int = 6, broken: int | None = None, **columns: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    cells = [
        {"bytes": b"x" if i == broken else encoded(grey(i)), "path": None} for i in range(count)
    ]
    features = {
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=["bee", "ant", "fly"]),
        **columns,
    }
    rows = {"picture": cells, "kind": [i % 3 for i in range(count)]}
    rows |= {name: list(range(count)) for name in columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))
