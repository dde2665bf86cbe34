"""On which held-out images the effects of parts are measured."""

from __future__ import annotations

from typing import Any

import pytest
from small import small_images, small_vit

from blockfit.search.held_out import HeldOut
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting


def test_effects_of_heads_are_measured_on_half_of_the_held_out_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = small_vit(4), []
    trials = HeldOut.trials

    def noted(self: HeldOut, solutions: Any, failed: Any, batches: Any = None) -> Any:
        found = trials(self, solutions, failed, batches)
        parts = {cut.part for one in solutions for cut in one.plan.narrowings}
        seen.extend((part, {one.images for one in found}) for part in parts)
        return found

    monkeypatch.setattr(HeldOut, "trials", noted)
    session = Session(Setting.of(model, small_images(160)), RECIPES["default"])
    assert len(session.held_out) == 32  # two batches
    session.cuts.measure()
    images = {part: {n for name, some in seen if name == part for n in some} for part, _ in seen}
    assert images == {"mlp": {32}, "values": {16}, "keys": {16}}
