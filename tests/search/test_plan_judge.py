"""A plan that is judged keeps its cuts, whatever becomes of its maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import one_thread as one_thread
from small import small_images, small_vit

import blockfit
from blockfit.search.held_out import HeldOut
from blockfit.search.plan_judge import PlanJudge


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


def test_with_enough_images_the_judged_solution_takes_over_what_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is kept is the same either way; only the solution that judges it is another."""
    images, given = small_images(40), []
    point = PlanJudge.point

    def noted(self: PlanJudge, plan: Any, choices: Any = None) -> Any:
        given.append(choices)
        return point(self, plan, choices)

    monkeypatch.setattr(PlanJudge, "point", noted)
    made = []
    for tokens in (10**9, 0):
        monkeypatch.setattr("blockfit.search.cuts.SETTLED", tokens)
        made.append(blockfit.compress(small_vit(4), images, params=0.8, cuts="mlp", final=0))
    assert given[0] is None
    assert set(given[1].neurons) == {cut.block for cut in made[1].plan.narrowings}
    one, other = (result.model.state_dict() for result in made)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
