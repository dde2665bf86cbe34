"""A plan that is judged keeps its cuts, whatever becomes of its maps."""

from __future__ import annotations

from typing import Any

import pytest
from families import one_thread as one_thread
from small import small_images, small_vit

import blockfit
from blockfit.search.held_out import HeldOut


def test_a_map_that_is_worse_than_identity_leaves_narrowed_parts_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The small model meets its budget, as it did before the map was replaced."""
    images, plan = small_images(32), blockfit.Plan.of(["2:3"], "affine")
    narrow = blockfit.compress(small_vit(6), images, params=0.8, cuts="mlp").plan.narrowings
    kept = tuple(cut for cut in narrow if cut.block != 2)
    assert kept
    mixed = blockfit.Plan(plan.replacements, kept)
    judge = HeldOut.judge

    def worse(self: HeldOut, solution: Any) -> Any:
        fidelity, errors, top1 = judge(self, solution)
        bad = [vars(e) | {"error": 2.0, "identity_error": 1.0} for e in errors]
        found = [
            type(e)(**b) if e.map != "identity" else e for e, b in zip(errors, bad, strict=True)
        ]
        return fidelity, found, top1

    monkeypatch.setattr(HeldOut, "judge", worse)
    small = blockfit.compress(small_vit(6), images, plan=mixed)
    assert [entry.map for entry in small.plan] == ["identity"]
    assert small.plan.narrowings == kept
