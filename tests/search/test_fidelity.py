"""Fidelity against scipy, numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from families import one_thread  # noqa: F401
from sklearn.metrics.pairwise import paired_cosine_distances

from blockfit.models.head import Observation
from blockfit.search.fidelity import Fidelity, FidelityMeter, effect_of, effects, kl_divergence

IMAGES, FEATURES, CLASSES = 23, 7, 5


def observation(seed: int, head: bool = True) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(IMAGES, FEATURES, generator=generator)
    logits = 3 * torch.randn(IMAGES, CLASSES, generator=generator)
    return Observation(features, logits if head else None)


def part(whole: Observation, images: slice) -> Observation:
    logits = None if whole.logits is None else whole.logits[images]
    return Observation(whole.features[images], logits)


def measured(before: Observation, after: Observation, *cuts: int) -> Fidelity:
    meter = FidelityMeter()
    for start, stop in zip((0, *cuts), (*cuts, IMAGES), strict=True):
        meter.add(part(before, slice(start, stop)), part(after, slice(start, stop)))
    return meter.result()


def test_the_figures_are_those_of_scipy_and_scikit_learn() -> None:
    before, after = observation(1), observation(2)
    got = measured(before, after)
    assert before.logits is not None
    assert after.logits is not None
    p, q = (scipy.special.softmax(o.logits.double().numpy(), axis=1) for o in (before, after))
    assert got.images == IMAGES
    assert got.kl == pytest.approx(scipy.stats.entropy(p, q, axis=1).mean())
    assert got.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    x, y = before.features.numpy(), after.features.numpy()
    assert got.feature_cosine == pytest.approx(1 - paired_cosine_distances(x, y).mean(), abs=1e-6)
    error = (np.linalg.norm(y - x, axis=1) / np.linalg.norm(x, axis=1)).mean()
    assert got.feature_relative_error == pytest.approx(error)


def test_batches_of_any_size_give_the_same_means() -> None:
    before, after = observation(1), observation(2)
    whole = measured(before, after)
    parts = measured(before, after, 3, 20)
    for name in ("kl", "agreement", "feature_cosine", "feature_relative_error"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_a_model_is_faithful_to_itself() -> None:
    same = measured(observation(1), observation(1))
    assert (same.kl, same.agreement, same.feature_relative_error) == (0, 1, 0)
    assert same.feature_cosine == pytest.approx(1)


def test_the_loss_is_the_kl_or_without_a_head_the_error_of_the_features() -> None:
    with_head = measured(observation(1), observation(2))
    without = measured(observation(1, head=False), observation(2, head=False))
    assert without.kl is None
    assert without.agreement is None
    assert with_head.loss == with_head.kl
    assert without.loss == without.feature_relative_error == with_head.feature_relative_error


@pytest.mark.parametrize("cut", [IMAGES, 10])
def test_the_effect_of_a_cut_is_the_kl_of_a_softer_softmax(cut: int) -> None:
    before, after = observation(1), observation(2)
    sums = [effects(part(before, s), part(after, s)) for s in (slice(0, cut), slice(cut, None))]
    assert before.logits is not None
    assert after.logits is not None
    soft = [scipy.special.softmax(x.logits.double().numpy() / 2, axis=1) for x in (before, after)]
    expected = 4 * scipy.stats.entropy(*soft, axis=1).mean()
    assert effect_of(sums) == pytest.approx(expected, rel=1e-9)


def test_the_effect_of_a_cut_without_a_head_is_of_the_features() -> None:
    before, after = observation(1, head=False), observation(2, head=False)
    assert effect_of([effects(before, after)]) == measured(before, after).effect


def test_the_kl_of_nearly_equal_and_of_extreme_logits_is_exact() -> None:
    """Second order: KL(p ‖ p + ε) is the variance of ε under p, halved; float32 cannot see it."""
    logits = torch.randn(4, CLASSES)
    change = 1e-4 * torch.randn(4, CLASSES).double()
    p = logits.double().softmax(1)
    variance = (p * change.square()).sum(1) - (p * change).sum(1).square()
    got = kl_divergence(logits, logits.double() + change)
    torch.testing.assert_close(got, variance / 2, rtol=1e-3, atol=0)
    sure = torch.tensor([[200.0, 0.0]])
    assert kl_divergence(sure, -sure).item() == pytest.approx(200)
    assert kl_divergence(logits, logits).min() >= 0


def test_features_of_nothing_do_not_divide_by_zero() -> None:
    nothing = Observation(torch.zeros(2, FEATURES), None)
    meter = FidelityMeter()
    meter.add(nothing, nothing)
    assert meter.result().feature_relative_error == 0
    assert FidelityMeter().result().images == 0
