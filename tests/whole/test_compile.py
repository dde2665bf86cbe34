"""torch.compile: a compressed model falls into as many graphs as its original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import saved
from families import FAMILIES
from families import one_thread as one_thread
from torch import _dynamo as dynamo
from torch import nn

from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.models.blocks import find_chain
from blockfit.models.head import primary_output
from blockfit.models.surgery import apply_plan

PLANS = {
    "identity": {},
    "scale": {},
    "affine": {"per_token_type": True},
    "low-rank": {"rank": 2},
}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


def compressed(model: nn.Module, images: Any, kind: str) -> nn.Module:
    """Blocks 1 and 2 are replaced by a map whose weights are random."""
    blocks = find_chain(model, images)
    plan = Plan.of(["1:3"], kind, **PLANS[kind])
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    for parameter in maps[0].parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_plan(model, blocks, plan, maps)
    return model


def graphs(model: nn.Module, images: Any) -> tuple[int, int]:
    """Numbers of graphs and of breaks between them."""
    dynamo.reset()
    with torch.no_grad():
        told = dynamo.explain(model)(images)
    return told.graph_count, told.graph_break_count


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier", "timm-vit"])
def test_a_map_adds_no_graph_break(name: str) -> None:
    family = FAMILIES[name]
    images = family.images(2)
    whole = graphs(family.build(), images)
    assert whole == (1, 0)
    for kind in PLANS:
        assert graphs(compressed(family.build(), images, kind), images) == whole, kind


@pytest.mark.parametrize("name", ["dinov2-classifier", "timm-vit"])
def test_a_compressed_model_compiles_as_one_graph_and_computes_alike(name: str) -> None:
    family = FAMILIES[name]
    images = family.images(2)
    model = compressed(family.build(), images, "affine")
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(primary_output(compiled(images)), primary_output(model(images)))


@pytest.mark.parametrize("name", ["vit-classifier", "timm-vit", "torchvision-vit"])
def test_a_narrowed_model_compiles_as_one_graph_and_computes_alike(
    name: str, tmp_path: Path
) -> None:
    images = FAMILIES[name].images(2)
    model = saved(tmp_path / "small", name, Plan(()), share=0.5).model
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(primary_output(compiled(images)), primary_output(model(images)))


class Breaking(nn.Module):
    """A block that dynamo has to leave its graph for."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dynamo.graph_break()
        return self.block(x)


def test_a_graph_break_would_be_seen() -> None:
    family = FAMILIES["timm-vit"]
    model: Any = family.build()
    model.blocks[1] = Breaking(model.blocks[1])
    assert graphs(model, family.images(2))[1] > 0
