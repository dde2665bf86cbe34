"""Racing single spans and putting sets of them together by sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from families import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SmallViT, separate_sets, small_blocks, small_images, small_pictures, small_vit

from blockfit.data.images import images as open_images
from blockfit.fit.closed_form import fit_map
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan, Replacement, Span, runs_of, spans_up_to
from blockfit.search.calibrate import calibrate
from blockfit.search.candidates import cheapest, race
from blockfit.search.held_out import HeldOut
from blockfit.search.solve import Solution
from blockfit.search.states import TracedImages

DEPTH = 6
NEW = small_pictures(24, seed=1)


@settings(max_examples=60)
@given(st.data(), st.integers(2, 7), st.integers(1, 4), st.integers(1, 8))
def test_the_cheapest_sets_are_those_of_brute_force(
    data: st.DataObject, depth: int, longest: int, how_many: int
) -> None:
    spans = spans_up_to(depth, longest)
    known = data.draw(st.lists(st.sampled_from(spans), unique=True, min_size=1))
    prices = st.floats(0, 100, allow_nan=False)
    costs = {span: data.draw(prices) for span in known}
    size = data.draw(st.integers(1, depth))
    found = cheapest(depth, size, costs, how_many)
    every = separate_sets(depth, size, known)
    assert set(found) <= set(every)
    assert len(set(found)) == len(found) == min(how_many, len(every))

    def cost(chosen: tuple[Span, ...]) -> float:
        return sum(costs[span] for span in chosen)

    best = sorted(map(cost, every))[:how_many]
    assert list(map(cost, found)) == pytest.approx(best)


@given(st.sets(st.integers(0, 20)))
def test_runs_are_the_fewest_spans_of_some_blocks(blocks: set[int]) -> None:
    runs = runs_of(blocks)
    assert [block for run in runs for block in run.blocks] == sorted(blocks)
    assert all(left.stop < right.start for left, right in itertools.pairwise(runs))


# The race of single spans


def identities(spans: Iterable[Span]) -> list[Solution]:
    return [
        Solution(Plan((entry,)), (empty_map(entry, 16),))
        for entry in (Replacement(span, "identity") for span in spans)
    ]


def with_idle_block(index: int, depth: int = DEPTH) -> SmallViT:
    """A model in which one block does next to nothing."""
    model = small_vit(depth, residual=1.0)
    for name in ("gamma1", "gamma2"):
        getattr(model.blocks[index], name).data *= 1e-3
    return model


@pytest.mark.parametrize("idle", [0, 3, 5])
def test_the_race_finds_a_planted_redundant_block(idle: int) -> None:
    model = with_idle_block(idle)
    held_out = HeldOut(
        TracedImages.everywhere(model, small_blocks(model), open_images(NEW, batch_size=4))
    )
    scores = race(held_out, identities(spans_up_to(DEPTH, 1)), passes=2.0)
    assert len(scores) == DEPTH
    assert min(scores, key=lambda entry: scores[entry]).span == Span(idle, idle + 1)


@pytest.mark.parametrize("passes", [2.0, 3.0, 6.0])
def test_the_race_spends_no_more_than_it_may_and_most_on_the_best(passes: float) -> None:
    model = with_idle_block(2)
    held_out = HeldOut(
        TracedImages.everywhere(model, small_blocks(model), open_images(NEW, batch_size=2))
    )
    seen: dict[Replacement, int] = {}
    several = held_out.trials

    def counted(solutions: Sequence[Solution], failed: Any, batches: Any = None) -> Any:
        for solution in solutions:
            entry = solution.plan.replacements[0]
            seen[entry] = seen.get(entry, 0) + 1
        return several(solutions, failed, batches)

    held_out.trials = counted  # type: ignore[method-assign]
    scores = race(held_out, identities(spans_up_to(DEPTH, 3)), passes)
    assert held_out.passes <= passes * len(held_out) + 1e-9
    assert set(scores) == set(seen)
    assert len(seen) == len(spans_up_to(DEPTH, 3))
    ones = sorted((e for e in scores if len(e.span) == 1), key=lambda e: scores[e])
    assert seen[ones[0]] == max(seen[e] for e in ones) > min(seen[e] for e in ones)


def test_with_time_for_all_every_score_is_that_of_all_images() -> None:
    model = with_idle_block(2)
    held_out = HeldOut(
        TracedImages.everywhere(model, small_blocks(model), open_images(NEW, batch_size=8))
    )
    candidates = identities(spans_up_to(DEPTH, 2))
    scores = race(held_out, candidates, passes=1e9)
    for candidate in candidates:
        whole = held_out.score(candidate).effect
        assert scores[candidate.plan.replacements[0]] == pytest.approx(whole)


def test_all_57_spans_with_3_kinds_of_map_cost_less_than_12_plain_passes() -> None:
    model = small_vit(12)
    blocks = small_blocks(model)
    spans = spans_up_to(12, 6)
    moments = calibrate(model, blocks, small_images(8), spans)
    candidates = []
    for span in spans:
        for kind in ("identity", "scale", "affine"):
            entry = Replacement(span, kind)
            candidates.append(Solution(Plan((entry,)), (fit_map(entry, moments),)))
    held_out = HeldOut(
        TracedImages.everywhere(model, blocks, small_images(128, seed=2, batch_size=16))
    )
    assert len(race(held_out, candidates)) == len(candidates) == 3 * 57
    assert held_out.passes < 12 * 128
