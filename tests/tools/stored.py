"""Compressed tiny models of every library, and folders of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor, nn

from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.formats.folder import save
from blockfit.models.blocks import Blocks, find_chain
from blockfit.models.demo import DigitsViT, demo_arguments
from blockfit.models.forward import call
from blockfit.models.head import primary_output
from blockfit.models.load import Source, source_of
from blockfit.models.surgery import apply_plan

PLAN = Plan((Replacement(Span(0, 1), "low-rank", 3), Replacement(Span(2, 4), "affine")))
REPORT = {"seed": 0, "calibration": {"used": 8}, "ratio": 0.5}


def small_model(
    name: str, plan: Plan = PLAN, change: Callable[[Any], Any] | None = None
) -> tuple[nn.Module, Blocks, Source, Tensor]:
    """A compressed tiny model with random maps, its blocks, its source, and images for it."""
    if name == "demo":
        model: nn.Module = DigitsViT(**demo_arguments())
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        images = torch.randn(3, 1, 8, 8)
    else:
        model, images = FAMILIES[name].build(), FAMILIES[name].images()
    if change is not None:
        change(model)
    model.eval()
    source, blocks = source_of(model), find_chain(model, images)
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    for parameter in (p for m in maps for p in m.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    apply_plan(model, blocks, plan, maps)
    return model, blocks, source, images


def saved(folder: Path, name: str = "plain", plan: Plan = PLAN, **options: Any) -> nn.Module:
    model, blocks, source, _ = small_model(name, plan, **options)
    save(folder, model, blocks, plan, source=source, report=REPORT)
    return model


def output(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return primary_output(call(model, images))


KINDS = {
    "transformers": "dinov2-classifier",
    "timm": "timm-dinov2-reg4",
    "torchvision": "torchvision-vit",
    "demo": "demo",
    "module": "plain-tuple",
}
