"""Where a run came from, as a report says it."""

from __future__ import annotations

from blockfit.fields import Values
from blockfit.reports.facts import run_facts


def test_the_images_keep_their_name_beside_the_parts_that_judged() -> None:
    told = {"source": "digits", "total": 10, "used": 4, "fit": 3, "held_out": 1}
    facts = run_facts(Values({}, "run"), Values({**told, "judged": 2, "final": 1}, "calibration"))
    found = {fact.name: fact.value for fact in facts}
    assert found["calibration images"] == "4 of 10 from digits"
    assert found["parts of the images"] == (
        "3 fitted on, 1 chose the plan, 2 judged the budget, 1 for the final figures alone"
    )


def test_views_of_few_images_are_told() -> None:
    told = {"source": "digits", "fit": 26, "held_out": 6, "views": 8}
    facts = run_facts(Values({}, "run"), Values(told, "calibration"))
    found = {fact.name: fact.value for fact in facts}
    assert found["parts of the images"] == "26 fitted on (8 views of each), 6 chose the plan"
