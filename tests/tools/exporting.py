"""What the tests of exports share: a tiny model solved and saved, and where blockfit is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import fresh
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockfit.data.images import images as open_images
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Narrowing, Plan, Replacement, Span, runs_of
from blockfit.formats.folder import Saved, load_saved, save
from blockfit.models.blocks import block_modules, find_chain
from blockfit.models.forward import call, evaluating
from blockfit.models.head import primary_output
from blockfit.models.load import source_of
from blockfit.models.parts import find_parts
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.probe import Probe
from blockfit.models.residual import find_writers
from blockfit.models.surgery import apply_plan
from blockfit.models.trace import trace
from blockfit.provenance import installed_versions
from blockfit.search.solve import Options, solve
from blockfit.search.states import TracedImages

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from without_blockfit import CHILD, environment, output_elsewhere

__all__ = [
    "MAPS",
    "PLAIN",
    "alone",
    "elsewhere",
    "environment",
    "nearly_empty",
    "output",
    "prepared",
    "saved",
    "uniform",
]

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
    blocks = find_chain(model, pictures)
    source = source_of(model)
    if preprocessing is not None:
        object.__setattr__(source, "preprocessing", preprocessing)
    originals = TracedImages.of(model, blocks, open_images(pictures, batch_size=6))
    if share is not None:
        plan = Plan(plan.replacements, narrowings(originals, plan, share))
    solve(originals, plan, Options(repair="mlp")).apply(model, blocks)
    save(folder, model, blocks, plan, source=source, report={})
    return load_saved(folder)


def narrowings(originals: TracedImages, plan: Plan, share: float) -> tuple[Narrowing, ...]:
    """Every part of the blocks that ``plan`` keeps, with a share of its dimensions."""
    kept = sorted(set(range(originals.blocks.depth)) - set(plan.removed_blocks))
    return tuple(
        replace(part, kept=max(1, int(share * part.size)))
        for index in kept
        for part in originals.probe.parts(index).whole.values()
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


def alone(exported: Path, images: Tensor, traffic: Path) -> Tensor:
    """The same in a fork of a process that has no blockfit, which takes far less time."""
    save_file({"images": images}, traffic / "in.safetensors")
    result = traffic / "out.safetensors"
    fresh.python("-c", CHILD, exported, traffic / "in.safetensors", result, cwd=traffic, alone=True)
    return load_file(result)["out"]


def nearly_empty(name: str) -> Saved:
    """A tiny model whose first three blocks are one map and whose last keeps half of every part.

    Its graph is as short as one with a map and a narrowed block can be.
    """
    model, pictures = FAMILIES[name].build(), FAMILIES[name].images(2)
    blocks, source = find_chain(model, pictures), source_of(model)
    with evaluating(model), torch.no_grad():
        parts = Probe(model, blocks, pictures).parts(3).whole.values()
    cuts = tuple(replace(part, kept=max(1, part.size // 2)) for part in parts)
    plan = Plan((Replacement(Span(0, 3), "affine"),), cuts)
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    with torch.no_grad():
        for parameter in maps[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    apply_plan(model, blocks, plan, maps)
    return Saved(model, blocks, plan, {}, source, installed_versions())


def uniform(
    name: str,
    keep: float = 0.5,
    gone: Sequence[int] = (),
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
) -> Saved:
    """A tiny model whose MLPs all keep a share of their neurons, and without some blocks."""
    family = FAMILIES[name]
    model, pictures = family.build(seed), family.images(4)
    blocks, source = find_chain(model, pictures), source_of(model)
    source = replace(source, preprocessing=preprocessing)
    with evaluating(model):
        seen = trace(model, blocks, pictures, range(blocks.depth))
        block = block_modules(model, blocks)[1]
        run, hidden = seen.runner(block, 1), seen.states[1]
        part = find_parts(block, 1, find_writers(block, run, hidden), run, hidden).whole["mlp"]
    kept = int(part.size * keep)
    left = [index for index in range(blocks.depth) if index not in gone]
    entries = tuple(Replacement(span, "identity") for span in runs_of(gone))
    plan = Plan(entries, tuple(replace(part, block=index, kept=kept) for index in left))
    apply_plan(model, blocks, plan, [empty_map(entry, blocks.width) for entry in plan])
    return Saved(model, blocks, plan, {}, source, installed_versions())
