"""The small ViT and DeiT in ``models/`` are what their page says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from families import one_thread as one_thread

import blockfit
from blockfit.models.blocks import find_chain
from blockfit.models.head import observe

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "vit-tiny-cifar10": ("ViTForImageClassification", 1),
    "deit-tiny-cifar10": ("DeiTForImageClassificationWithTeacher", 2),
}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_a_folder_loads_as_its_class_with_twelve_blocks(name: str) -> None:
    folder = ROOT / "models" / name
    model: Any = blockfit.load(folder)
    kind, prefix = MODELS[name]
    assert type(model).__name__ == kind
    blocks = find_chain(model)
    assert (blocks.depth, blocks.width, blocks.prefix_tokens) == (12, 96, prefix)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 6e6
    page = (ROOT / "models" / "README.md").read_text("utf-8")
    log = list(csv.DictReader((folder / "training.csv").open(encoding="utf-8")))
    assert log[-1]["test_images"] == "10000"
    (row,) = [line for line in page.splitlines() if f"| `{name}`" in line]
    assert f"{sum(p.numel() for p in model.parameters()):,}" in row
    assert f"{float(log[-1]['test_top1']):.2%}" in row


@every_model
def test_it_knows_the_images_of_its_page(name: str, cifar10_test: Path) -> None:
    model = blockfit.load(ROOT / "models" / name)
    images = blockfit.images(str(cifar10_test), model, limit=300)
    right = 0
    blocks = find_chain(model)
    for batch in images.batches():
        seen = observe(model, blocks, batch.inputs)
        assert seen.logits is not None
        assert batch.labels is not None
        right += int((seen.logits.argmax(1) == batch.labels).sum())
    assert right / 300 > 0.65
