"""The knapsack against brute force over every combination of widths and spans."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from blockfit.fit.plan import Narrowing, Plan, Replacement, Span
from blockfit.search.choose import Priced, choose, choose_uniform
from blockfit.search.curves import Curve, interpolated, widths_of


def curve(block: int, part: str, effects: tuple[float, ...], unit: int) -> Curve:
    """A part of 4 dimensions of which 4, 3, 2 or 1 may stay."""
    return Curve(Narrowing(block, part, 4, 4), (4, 3, 2, 1), effects, unit, 2 * unit)


def random_curves(depth: int, seed: int) -> list[Curve]:
    rng = random.Random(seed)
    made = []
    for block in range(depth):
        for part in ("mlp", "keys"):
            steps = itertools.accumulate(rng.random() ** 3 for _ in range(3))
            made.append(curve(block, part, (0.0, *steps), rng.choice((1, 3, 10))))
    return made


def best_by_brute_force(
    curves: list[Curve], spans: list[Priced], depth: int, to_save: float
) -> float:
    best = math.inf
    for count in range(len(spans) + 1):
        for gone in itertools.combinations(spans, count):
            blocks = [b for s in gone for b in s.entry.span.blocks]
            if len(set(blocks)) < len(blocks) or len(blocks) == depth:
                continue
            left = [c for c in curves if c.whole.block not in blocks]
            effect, saved = sum(s.effect for s in gone), sum(s.saved for s in gone)
            for widths in itertools.product(range(4), repeat=len(left)):
                total = saved + sum(i * c.unit for i, c in zip(widths, left, strict=True))
                if total >= to_save:
                    cost = effect + sum(c.effects[i] for i, c in zip(widths, left, strict=True))
                    best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_choice_meets_the_budget_and_is_close_to_the_best_there_is(
    seed: int, part: float
) -> None:
    curves = random_curves(2, seed)
    spans = [
        Priced(Replacement(Span(0, 1), "affine"), 0.8, 30.0),
        Priced(Replacement(Span(1, 2), "identity"), 1.5, 50.0),
    ]
    most = sum(3 * c.unit for c in curves)
    found = choose(curves, spans, 2, part * most)
    assert found is not None
    assert found.saved >= part * most - 1e-9
    best = best_by_brute_force(curves, spans, 2, part * most)
    # A price finds the corners of the frontier; between two corners it is off by one step at most.
    assert best - 1e-9 <= found.effect <= best + max(c.effects[-1] for c in curves)


def test_the_cheapest_effect_goes_first() -> None:
    curves = [curve(0, "mlp", (0, 1, 2, 3), 1), curve(1, "mlp", (0, 0.1, 0.2, 0.3), 1)]
    found = choose(curves, (), 2, 3)
    assert found is not None
    assert [(cut.block, cut.kept) for cut in found.plan.narrowings] == [(1, 1)]
    assert found.effect == pytest.approx(0.3)


def test_a_block_in_a_span_is_not_narrowed_as_well() -> None:
    curves = random_curves(3, 1)
    spans = [Priced(Replacement(Span(1, 2), "affine"), 1e-6, 5.0)]
    found = choose(curves, spans, 3, 20)
    assert found is not None
    assert found.plan.spans == (Span(1, 2),)
    assert all(cut.block != 1 for cut in found.plan.narrowings)


def test_a_plan_keeps_a_block_where_none_is_missed() -> None:
    curves = [curve(block, "mlp", (0, 1, 2, 3), 1) for block in range(3)]
    spans = [
        Priced(Replacement(Span(start, start + 1), "affine"), effect, 9.0)
        for start, effect in enumerate((1e-9, 2e-9, 3e-9))
    ]
    spans.append(Priced(Replacement(Span(0, 3), "affine"), 0.0, 27.0))
    found = choose(curves, spans, 3, 18)
    assert found is not None
    assert found.plan.removed_blocks == (0, 1)
    found = choose(curves, spans, 3, 20)
    assert found is not None
    assert (found.plan.removed_blocks, found.saved) == ((0, 1), 20)
    assert choose(curves, spans, 3, 22) is None
    gone = [choice.plan.removed_blocks for choice in choose_uniform(curves, spans, 3, 5)]
    assert gone
    assert all(len(blocks) < 3 for blocks in gone)


def test_what_cannot_be_saved_is_said_by_none() -> None:
    curves = random_curves(2, 0)
    assert choose(curves, (), 2, sum(3 * c.unit for c in curves) + 1) is None


def test_room_that_a_price_leaves_is_given_back() -> None:
    curves = [curve(0, "mlp", (0, 1, 1.1, 1.2), 10), curve(1, "keys", (0, 0.9, 1.8, 2.7), 1)]
    found = choose(curves, (), 2, 12)
    assert found is not None
    assert found.effect == pytest.approx(1.1)  # 20 of the first alone, none of the second


def test_spans_that_a_price_takes_beyond_the_budget_are_kept() -> None:
    """Spans that are equally dear for what they save go all or not at all by a price alone."""
    spans = [
        Priced(Replacement(Span(i, i + 1), "affine"), i + 1.0, 10.0 * (i + 1)) for i in range(3)
    ]
    for to_save in (5, 15, 25, 35, 45, 55):
        found = choose((), spans, 5, to_save)
        assert found is not None
        assert found.saved == to_save + 5
        assert found.effect == pytest.approx(found.saved / 10)


def test_units_of_another_price_decide() -> None:
    curves = [curve(0, "mlp", (0, 1, 2, 3), 1), curve(1, "mlp", (0, 1, 2, 3), 1)]
    found = choose(curves, (), 2, 3, {(0, "mlp"): 3.0, (1, "mlp"): 0.1})
    assert found is not None
    assert [(cut.block, cut.kept) for cut in found.plan.narrowings] == [(0, 3)]


def test_effects_between_trials_follow_the_error() -> None:
    widths = (8, 6, 4, 2, 1)
    errors = {8: 0.0, 6: 1.0, 4: 10.0, 2: 100.0, 1: 1000.0}
    effects = interpolated(widths, errors, {6: 0.01, 2: 0.04})
    assert effects[0] == 0.0
    assert effects[1] == pytest.approx(0.01)
    assert effects[2] == pytest.approx(0.02)  # half way in the logarithm of the error
    assert effects[3] == pytest.approx(0.04)
    assert effects[4] == pytest.approx(0.4)  # beyond the last trial like the error itself


def test_effects_never_fall_as_widths_shrink() -> None:
    effects = interpolated((4, 3, 2, 1), {4: 0, 3: 1, 2: 2, 1: 3}, {3: 0.5, 1: 0.1})
    assert list(effects) == sorted(effects)


@pytest.mark.parametrize(
    ("size", "part", "multiple", "expected"),
    [
        (64, "keys", None, (64, 56, 48, 40, 32, 24, 16, 8)),
        (70, "mlp", None, (70, 68, 51, 34, 17)),
        (70, "mlp", 32, (70, 64, 32)),
        (64, "mlp", 64, (64,)),
        (128, "mlp", None, (128, 96, 64, 32)),
        (6, "values", None, (6, 5, 4, 3, 2, 1)),
    ],
)
def test_widths_are_multiples_that_kernels_like(
    size: int, part: str, multiple: int | None, expected: tuple[int, ...]
) -> None:
    assert widths_of(Narrowing(0, part, size, size), multiple) == expected


def uniform_by_brute_force(
    curves: list[Curve], spans: list[Priced], depth: int, to_save: float
) -> dict[int, float]:
    """By the number of blocks that go, the least effect at the widest width that is enough."""
    best: dict[int, float] = {}
    for step in range(4):
        found: dict[int, list[tuple[float, float]]] = {}
        for count in range(len(spans) + 1):
            for gone in itertools.combinations(spans, count):
                blocks = [b for s in gone for b in s.entry.span.blocks]
                if len(set(blocks)) < len(blocks) or len(blocks) == depth:
                    continue
                left = [c for c in curves if c.whole.block not in blocks]
                effect = sum(s.effect for s in gone) + sum(c.effects[step] for c in left)
                saved = sum(s.saved for s in gone) + step * sum(c.unit for c in left)
                found.setdefault(len(blocks), []).append((effect, saved))
        for count, tried in found.items():
            effect, saved = min(tried)
            if saved >= to_save and count not in best:
                best[count] = effect
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_uniform_choice_is_the_best_of_every_number_of_blocks(seed: int, part: float) -> None:
    depth, rng = 4, random.Random(seed)
    curves = [c for c in random_curves(depth, seed) if c.whole.part == "mlp"]
    spans = [
        Priced(Replacement(Span(start, stop), "identity"), rng.random() * 3, 40.0 * (stop - start))
        for start in range(depth)
        for stop in (start + 1, start + 2)
        if stop <= depth
    ]
    to_save = part * sum(3 * c.unit for c in curves)
    found = choose_uniform(curves, spans, depth, to_save)
    expected = uniform_by_brute_force(curves, spans, depth, to_save)
    assert {len(c.plan.removed_blocks): c.effect for c in found} == pytest.approx(expected)
    assert [c.effect for c in found] == sorted(c.effect for c in found)
    for choice in found:
        assert choice.plan.not_plain(depth) is None
        assert choice.saved >= to_save - 1e-9


def test_of_mlps_alone_the_widest_that_is_enough() -> None:
    curves = [curve(block, "mlp", (0, 1, 2, 3), 5) for block in range(3)]
    (found,) = choose_uniform(curves, (), 3, 16)
    assert [(cut.block, cut.kept) for cut in found.plan.narrowings] == [(0, 2), (1, 2), (2, 2)]
    assert found.saved == 30
    assert choose_uniform(curves, (), 3, 46) == []


def test_widths_that_no_config_can_say_are_passed_over() -> None:
    curves = [curve(block, "mlp", (0, 1, 2, 3), 5) for block in range(3)]

    def says(plan: Plan) -> bool:
        return plan.narrowings[0].kept == 1

    (found,) = choose_uniform(curves, (), 3, 16, says=says)
    assert {cut.kept for cut in found.plan.narrowings} == {1}


def test_widths_between_those_of_the_curves_are_tried_where_a_config_is_limited_to_them() -> None:
    whole = Narrowing(0, "mlp", 12, 12)
    some = Curve(whole, (12, 8, 4), (0.0, 1.0, 3.0), 1, 2)
    choices = choose_uniform(
        [some], (), 1, 5, more_widths=(6,), says=lambda p: p.mlp_width(1)[1] == 6
    )
    assert [(c.effect, c.saved) for c in choices] == [(2.0, 6.0)]


def test_a_block_that_cannot_be_narrowed_keeps_all_blocks_whole() -> None:
    curves = [curve(block, "mlp", (0, 1, 2, 3), 5) for block in range(2)]
    spans = [Priced(Replacement(Span(2, 3), "identity"), 1.0, 5.0)]
    assert choose_uniform(curves, (), 3, 1) == []
    choices = choose_uniform(curves, spans, 3, 12)
    assert [c.plan.removed_blocks for c in choices] == [(2,)]
    assert {cut.kept for cut in choices[0].plan.narrowings} == {3}
