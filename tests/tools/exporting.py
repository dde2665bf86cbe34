"""What the tests of exports share: a tiny model solved and saved, and where blockfit is not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockfit.data.images import images as open_images
from blockfit.fit.plan import Narrowing, Plan, Replacement, Span
from blockfit.formats.folder import Saved, load_saved, save
from blockfit.models.blocks import find_blocks
from blockfit.models.forward import call
from blockfit.models.head import primary_output
from blockfit.models.load import source_of
from blockfit.models.preprocessing import Preprocessing
from blockfit.search.solve import Options, solve
from blockfit.search.states import Originals

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from without_blockfit import environment, output_elsewhere

__all__ = ["MAPS", "PLAIN", "elsewhere", "environment", "output", "prepared", "saved"]

PLAIN = Plan((Replacement(Span(0, 1), "identity"), Replacement(Span(2, 3), "folded")))
MAPS = Plan((Replacement(Span(0, 1), "affine"), Replacement(Span(2, 3), "low-rank", rank=4)))


def saved(
    folder: Path,
    name: str,
    plan: Plan = PLAIN,
    preprocessing: Preprocessing | None = None,
    share: float | None = None,
) -> Saved:
    """A tiny model, solved with ``plan`` and saved.

    Args:
        folder: new.
        name: of its family.
        plan: the spans.
        preprocessing: its own where ``None``.
        share: of the dimensions that every part of the blocks outside the spans keeps.
    """
    family = FAMILIES[name]
    model = family.build()
    pictures = family.images(12)
    blocks = find_blocks(model, pictures)
    source = source_of(model)
    if preprocessing is not None:
        object.__setattr__(source, "preprocessing", preprocessing)
    originals = Originals(model, blocks, open_images(pictures, batch_size=6))
    if share is not None:
        plan = Plan(plan.replacements, narrowings(originals, plan, share))
    solve(originals, plan, Options(repair="mlp")).apply(model, blocks)
    save(folder, model, blocks, plan, source=source, report={})
    return load_saved(folder)


def narrowings(originals: Originals, plan: Plan, share: float) -> tuple[Narrowing, ...]:
    """Every part of the blocks that ``plan`` keeps, with a share of its dimensions."""
    kept = sorted(set(range(originals.blocks.depth)) - set(plan.removed_blocks))
    return tuple(
        replace(part, kept=max(1, int(share * part.size)))
        for index in kept
        for part in originals.parts(index).whole.values()
    )


def prepared(size: int) -> Preprocessing:
    """Pillow and torch only."""
    half = [0.5, 0.5, 0.5]
    return Preprocessing.plain(size, channels=3, mean=half, std=half, interpolation="bicubic")


def output(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return primary_output(call(model, images))


def elsewhere(python: Path, exported: Path, images: Tensor, traffic: Path) -> Tensor:
    """The primary output of an export where blockfit is not installed."""
    save_file({"images": images}, traffic / "in.safetensors")
    return load_file(output_elsewhere(python, exported, traffic))["out"]
