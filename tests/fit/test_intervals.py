"""Intervals and bounds, beside scipy's, by their definitions, and by how often they hold."""

import math

import numpy as np
import pytest
from scipy import stats

from blockfit.fit.intervals import (
    drop_above,
    images_for,
    mean_above,
    mean_interval,
    paired_drop,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "images"), [(0, 20), (19, 20), (20, 20), (431, 512), (9516, 10000)]
)
def test_shares_have_the_interval_that_scipy_gives(hits, images):
    found = wilson(hits, images)
    expected = stats.binomtest(hits, images).proportion_ci(0.95, method="wilson")
    assert found.value == hits / images
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("worse", "images"), [(0, 102), (0, 1000), (1, 300), (7, 900), (40, 5000)])
def test_a_drop_without_changes_for_the_better_has_the_exact_bound(worse, images):
    """Clopper and Pearson's, as a quantile of the beta distribution."""
    expected = stats.beta.ppf(0.95, worse + 1, images - worse)
    assert drop_above(worse, 0, images) == pytest.approx(expected, rel=1e-6)


def test_no_change_among_102_images_still_allows_nearly_three_points():
    assert 100 * drop_above(0, 0, 102) == pytest.approx(2.89, abs=0.01)
    assert images_for(0.01) == 299  # the rule of three
    assert drop_above(0, 0, 299) <= 0.01 < drop_above(0, 0, 298)
    assert math.isinf(images_for(0.0))


@pytest.mark.parametrize(("worse", "better", "images"), [(12, 4, 300), (0, 0, 100), (3, 9, 50)])
def test_the_ends_of_a_paired_drop_are_where_the_score_test_says_so(worse, better, images):
    """The rate of changes for the better that is likeliest at each end, by trying them all."""
    found = paired_drop(worse, better, images)
    for end, sign in ((found.low, 1), (found.high, -1)):
        rates = np.linspace(max(-end, 0), (1 - end) / 2, 400_001)[1:-1]
        with np.errstate(divide="ignore"):
            likelihood = (
                worse * np.log(end + rates)
                + better * np.log(rates)
                + (images - worse - better) * np.log(1 - end - 2 * rates)
            )
        rate = rates[int(likelihood.argmax())]
        score = (worse - better - images * end) / math.sqrt(images * (2 * rate + end - end**2))
        assert score == pytest.approx(sign * stats.norm.ppf(0.975), abs=0.02)
    assert found.value == (worse - better) / images
    mirrored = paired_drop(better, worse, images)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize(
    ("worse", "better", "images"), [(0.02, 0.005, 400), (0.06, 0.05, 1000), (0.03, 0.0, 200)]
)
def test_bounds_and_intervals_of_a_drop_hold_as_often_as_they_say(worse, better, images):
    rng, drop, trials = np.random.default_rng(0), worse - better, 120
    above = between = 0
    for _ in range(trials):
        lost, won, _ = rng.multinomial(images, [worse, better, 1 - worse - better]).tolist()
        above += drop_above(lost, won, images) < drop
        found = paired_drop(lost, won, images)
        between += not found.low <= drop <= found.high
    assert above <= stats.binom.ppf(0.999, trials, 0.05)
    assert between <= stats.binom.ppf(0.999, trials, 0.05)


def test_the_exact_bound_and_its_approximation_meet():
    for better in (0, 20):
        exact, near = drop_above(60 - better, better, 3000), drop_above(61 - better, better, 3000)
        assert near == pytest.approx(exact, rel=0.05)


def test_means_have_the_interval_that_students_distribution_gives_where_it_should():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 399, values.mean(), values.std(ddof=1) / 20)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    assert mean_above(values) < found.high
    assert mean_interval(values) == found  # the draws have a seed


def test_the_interval_of_a_skewed_mean_holds():
    """The KL of images is skewed: most lose next to nothing, and a few very much."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(100):
        missed += mean_above(rng.exponential(0.1, 200) ** 1.5) < 0.1**1.5 * math.gamma(2.5)
    assert missed <= 12


def test_values_that_are_all_alike_have_no_width():
    found = mean_interval(np.full(50, 0.25))
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)
