"""How far figures of a few images may lie from those of all: intervals of shares, means, drops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
"""Of every interval and bound, where nothing else is said."""

FEW_CHANGES = 60
"""Changed answers up to which a bound is exact; beyond, the normal approximation is as good."""

RESAMPLES = 2000
"""Draws of a bootstrap."""

_AT_ONCE = 4_000_000  # drawn numbers in memory


@dataclass(frozen=True)
class Interval:
    """A figure, and the ends between which that of all images lies with ``CONFIDENCE``."""

    value: float
    low: float
    high: float

    def in_points(self) -> Interval:
        """Of a share: the same in points, which are hundredths."""
        return Interval(100 * self.value, 100 * self.low, 100 * self.high)

    def at_least_0(self) -> Interval:
        """The same of what cannot be negative."""
        return Interval(self.value, max(self.low, 0.0), self.high)


def wilson(hits: int, images: int, confidence: float = CONFIDENCE) -> Interval:
    """A share of images: the score interval (Wilson 1927), which holds near 0 and 1 as well."""
    z2 = _two_sided(confidence) ** 2
    share = hits / images
    middle = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * images)) / images) / (1 + z2 / images)
    low = 0.0 if hits == 0 else middle - half
    high = 1.0 if hits == images else middle + half
    return Interval(share, low, high)


def paired_drop(worse: int, better: int, images: int, confidence: float = CONFIDENCE) -> Interval:
    """By how much a share falls between two models on the same images: Tango's score interval.

    Args:
        worse: images that only the first model answers rightly.
        better: images that only the second does.
        images: all of them, also those on which the models do as well.
        confidence: of both ends together.

    References:
        Tango, Equivalence test and confidence interval for the difference in proportions for
        the paired-sample design, Statistics in Medicine 17 (1998).
    """
    z, value = _two_sided(confidence), (worse - better) / images
    high = _crossing(lambda drop: _score(worse, better, images, drop) <= -z, value, 1.0)
    low = -_crossing(lambda rise: _score(better, worse, images, rise) <= -z, -value, 1.0)
    return Interval(value, low, high)


def drop_above(worse: int, better: int, images: int, confidence: float = CONFIDENCE) -> float:
    """The largest fall of a share that what was seen leaves possible: a one-sided bound.

    The fall at which so few changes for the worse would be seen in 1 − ``confidence`` of all
    draws, the changes for the better being as likely as they are at that fall's maximum of the
    likelihood. Where nothing has changed this is 1 − (1 − ``confidence``)^(1/n), about 3 / n.

    Args:
        worse: images that only the first model answers rightly.
        better: images that only the second does.
        images: all of them.
        confidence: that the true fall lies below.
    """
    if worse + better > FEW_CHANGES:
        z = NormalDist().inv_cdf(confidence)
        return _crossing(
            lambda drop: _score(worse, better, images, drop) <= -z, (worse - better) / images, 1.0
        )
    return _crossing(
        lambda drop: _tail(worse, better, images, drop) <= 1 - confidence,
        (worse - better) / images,
        1.0,
    )


def images_for(drop: float, confidence: float = CONFIDENCE) -> float:
    """How many images it takes to show that a share falls by at most ``drop``, nothing changing.

    About 3 / ``drop``; infinite where ``drop`` is 0.
    """
    if drop <= 0:
        return math.inf
    return math.ceil(math.log(1 - confidence) / math.log1p(-min(drop, 1 - 1e-12)))


def mean_interval(values: Any, seed: int = 0, confidence: float = CONFIDENCE) -> Interval:
    """A mean of numbers, one per image: studentized bootstrap (Efron and Tibshirani 1993, 12.5).

    Args:
        values: shape (images,).
        confidence: of both ends together.
    """
    outside = (1 - confidence) / 2
    value, ends = _bootstrap(np.asarray(values, dtype=np.float64), seed, (outside, 1 - outside))
    return Interval(value, ends[0], ends[1])


def mean_above(values: Any, seed: int = 0, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper bound of a mean: studentized bootstrap, as ``mean_interval``."""
    return _bootstrap(np.asarray(values, dtype=np.float64), seed, (confidence,))[1][0]


def _bootstrap(
    values: np.ndarray, seed: int, levels: tuple[float, ...]
) -> tuple[float, list[float]]:
    count, value = len(values), float(values.mean())
    spread = float(values.std()) / math.sqrt(count)
    if spread == 0:
        return value, [value] * len(levels)
    rng, found = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, step := max(1, _AT_ONCE // count)):
        drawn = values[rng.integers(count, size=(min(step, RESAMPLES - start), count))]
        error = np.maximum(drawn.std(axis=1) / math.sqrt(count), 1e-3 * spread)
        found.append((drawn.mean(axis=1) - value) / error)
    shifts = np.quantile(np.concatenate(found), [1 - level for level in levels])
    return value, [value - float(shift) * spread for shift in np.atleast_1d(shifts)]


def _two_sided(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _crossing(beyond: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``beyond`` turns true between two numbers, by bisection."""
    for _ in range(40):
        middle = (low + high) / 2
        if beyond(middle):
            high = middle
        else:
            low = middle
    return high


def _better_rate(worse: int, better: int, images: int, drop: float) -> float:
    """The likeliest rate of changes for the better where the true fall is ``drop``."""
    a = 2 * images
    b = -worse - better + (2 * images - worse + better) * drop
    c = -better * drop * (1 - drop)
    rate = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    return max(rate, -drop, 0.0)


def _score(worse: int, better: int, images: int, drop: float) -> float:
    rate = _better_rate(worse, better, images, drop)
    variance = images * (2 * rate + drop * (1 - drop))
    gap = worse - better - images * drop
    return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)


def _tail(worse: int, better: int, images: int, drop: float) -> float:
    """How likely so small a fall is where the true one is ``drop``."""
    rate = _better_rate(worse, better, images, drop)
    changed = min(2 * rate + drop, 1.0)
    if changed <= 0:
        return 1.0
    for_the_worse = min((drop + rate) / changed, 1.0)
    most = min(images, math.ceil(images * changed + 9 * math.sqrt(images * changed) + 20))
    counts = np.arange(most + 1)
    factorial = _log_factorials(images)
    weights = _chances(factorial, np.array(images), counts, changed)
    hits = np.minimum(counts[None, :], counts[:, None])  # of so many changes: a row for each number
    chances = _chances(factorial, counts[:, None], hits, for_the_worse)
    few = 2 * counts[None, :] <= counts[:, None] + worse - better
    return float(weights @ (chances * (few & (counts[None, :] <= counts[:, None]))).sum(axis=1))


@lru_cache(maxsize=16)
def _log_factorials(most: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])


def _chances(
    factorial: np.ndarray, trials: np.ndarray, hits: np.ndarray, rate: float
) -> np.ndarray:
    """Binomial probabilities of so many hits."""
    misses = trials - hits
    log = factorial[trials] - factorial[hits] - factorial[misses]
    with np.errstate(divide="ignore", invalid="ignore"):
        log = log + np.where(hits > 0, hits * np.log(rate), 0.0)
        found: np.ndarray = np.exp(log + np.where(misses > 0, misses * np.log1p(-rate), 0.0))
    return found
