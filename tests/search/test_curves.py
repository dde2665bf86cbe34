"""On which held-out images the effects of parts are measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from small import small_images, small_vit

from blockfit.search.held_out import HeldOut
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting


@pytest.mark.views
@pytest.mark.parametrize(("views", "images"), [(1, 32), (None, 4 * 32)])
def test_effects_of_heads_are_measured_on_half_of_the_held_out_images(
    monkeypatch: pytest.MonkeyPatch, views: int | None, images: int
) -> None:
    model, seen = small_vit(4), []
    effects = HeldOut.effects

    def noted(self: HeldOut, solutions: Any, failed: Any, batches: Any = None) -> Any:
        parts = {cut.part for one in solutions for cut in one.plan.narrowings}
        count = len(self) if batches is None else sum(self.sizes[batch] for batch in batches)
        seen.extend((part, {count}) for part in parts)
        return effects(self, solutions, failed, batches)

    monkeypatch.setattr(HeldOut, "effects", noted)
    recipe = replace(RECIPES["default"], views=views)
    session = Session(Setting.of(model, small_images(160)), recipe)
    assert len(session.held_out) == 32  # two batches
    session.cuts.measure()
    found = {part: {n for name, some in seen if name == part for n in some} for part, _ in seen}
    assert found == {"mlp": {images}, "values": {images // 2}, "keys": {images // 2}}


def test_widths_are_multiples_of_what_was_asked_for_and_each_costs_more_than_the_wider() -> None:
    """Effects are known down to the smallest width, not only to the smallest of the default."""
    recipe = replace(RECIPES["default"], cuts=("mlp",))
    setting = Setting.of(small_vit(2), small_images(40))
    fine = Session(setting, recipe, multiple=2).cuts
    fine.measure()
    for curve in fine.curves:
        assert curve.widths == (*range(32, 0, -2),)
        assert all(after > before for before, after in pairwise(curve.effects))
    coarse = Session(setting, recipe, multiple=32).cuts
    coarse.measure()
    assert coarse.curves == []
