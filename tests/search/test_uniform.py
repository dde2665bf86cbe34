"""Budgets that a stock config has to say: from images to the library's own checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import prepared
from families import FAMILIES
from families import one_thread as one_thread

import blockfit
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.models.load import attach, source_of


def compressed(name: str, **budget: Any) -> blockfit.Result:
    family = FAMILIES[name]
    model = family.build()
    source = source_of(model)
    object.__setattr__(source, "preprocessing", prepared(family.image))
    attach(model, source)
    pictures = open_images(family.images(24), batch_size=8)
    return blockfit.compress(model, pictures, final=0, **budget)


def part_left(result: blockfit.Result) -> float:
    left: float = result.report["parameters_after"] / result.report["parameters_before"]
    return left


def test_a_uniform_budget_is_met_by_the_widest_mlps_and_loads_in_timm(tmp_path: Path) -> None:
    result = compressed("timm-vit", params=0.8, uniform=True)
    widths = result.plan.mlp_width(4)
    assert widths is not None
    assert not result.plan.removed_blocks
    assert part_left(result) <= 0.8
    one_step = 4 * 32 * (2 * 32 + 1) / result.report["parameters_before"]
    assert part_left(result) + one_step > 0.8
    blockfit.export_plain(result, tmp_path / "plain")
    timm = pytest.importorskip("timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    pictures = FAMILIES["timm-vit"].images(3, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(again(pictures), result.model(pictures), rtol=1e-5, atol=1e-5)


def test_only_widths_that_the_config_can_say_are_chosen(tmp_path: Path) -> None:
    """A DINOv2 of width 32 has MLPs of 128; 112 and 80 would be no whole ratios."""
    result = compressed("dinov2-classifier", params=0.85, recipe="plain", multiple_of=16)
    widths = result.plan.mlp_width(4)
    assert widths is not None
    assert part_left(result) <= 0.85
    done = blockfit.export_plain(result, tmp_path / "plain")
    assert done.parameters == result.report["parameters_after"]


def test_whole_blocks_go_where_narrower_mlps_are_not_enough(tmp_path: Path) -> None:
    result = compressed("timm-vit", params=0.3, recipe="plain")
    assert result.plan.removed_blocks
    assert {entry.map for entry in result.plan} <= {"identity", "folded"}
    assert part_left(result) <= 0.3
    assert blockfit.export_plain(result, tmp_path / "plain").blocks < 4


def test_where_no_config_can_say_a_width_whole_blocks_go(tmp_path: Path) -> None:
    """The pooling MLP of SigLIP has the width of the blocks' MLPs."""
    result = compressed("siglip-vision", params=0.8, recipe="plain")
    assert result.plan.narrowings == ()
    assert result.plan.removed_blocks
    blockfit.export_plain(result, tmp_path / "plain")


def test_uniform_refuses_what_no_stock_config_can_say() -> None:
    with pytest.raises(BlockfitError, match="cannot say narrower keys"):
        compressed("timm-vit", params=0.8, uniform=True, cuts="mlp,keys")
