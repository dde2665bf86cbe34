"""Layers whose weights are not theirs alone: tied to others, or made at each call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import SmallViT, small_images, small_pictures, small_vit
from torch import nn
from torch.nn.utils import prune

import blockfit
from blockfit.models.blocks import find_chain
from blockfit.models.probe import Probe


def tied_blocks(model: SmallViT) -> None:
    model.blocks[3].mlp = model.blocks[2].mlp


def tied_weights(model: SmallViT) -> None:
    model.blocks[3].mlp.narrow.weight = model.blocks[2].mlp.narrow.weight


def masked(model: SmallViT) -> None:
    for block in model.blocks[2:4]:
        prune.l1_unstructured(block.mlp.narrow, "weight", amount=0.5)


@pytest.mark.parametrize("change", [tied_blocks, tied_weights, masked])
def test_they_stay_as_they_are_and_the_reason_is_said(change: Callable[[SmallViT], None]) -> None:
    model = small_vit(6)
    change(model)
    with torch.no_grad():
        probe = Probe(model, find_chain(model, small_pictures(2)), small_pictures(4))
        for index in (2, 3):
            assert "mlp" not in probe.parts(index).whole
            assert "mlp.narrow: weights tied to others" in probe.parts(index).refused["mlp"]
            assert "mlp.narrow" not in [writer.name for writer in probe.writers(index)]
        assert "mlp" in probe.parts(1).whole

    result = blockfit.compress(model, small_images(48), params="75%")
    assert {cut.block for cut in result.plan.narrowings if cut.part == "mlp"}.isdisjoint({2, 3})
    kept = [i for i in (2, 3) if i not in result.plan.removed_blocks]
    for index in kept:
        before, after = model.blocks[index].mlp.narrow, result.model.blocks[index].mlp.narrow
        torch.testing.assert_close(after.weight, before.weight, rtol=0, atol=0)
    counted = sum(p.numel() for p in result.model.parameters())
    assert result.report["parameters_after"] == counted


@pytest.mark.parametrize("change", [tied_blocks, masked])
def test_whole_blocks_go_around_them(change: Callable[[SmallViT], None]) -> None:
    model = small_vit(6)
    change(model)
    result = blockfit.compress(model, small_images(48), spans=["0:1"], repair="mlp+attention")
    for index in (2, 3):
        before, after = model.blocks[index].mlp.narrow, result.model.blocks[index].mlp.narrow
        torch.testing.assert_close(after.weight, before.weight, rtol=0, atol=0)
    assert isinstance(result.model.blocks[2].mlp.narrow, nn.Linear)
