"""How close a small model's output is to the original's, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockfit.fit.numerics import exact
from blockfit.models.head import Observation


@dataclass(frozen=True)
class Fidelity:
    """Means over images; ``kl`` and ``agreement`` are ``None`` where the model has no head.

    Args:
        kl: KL(original ‖ compressed) of the head's softmax, in nats.
        agreement: fraction of images with the same top-1 class.
        feature_cosine: cosine of the final features.
        feature_relative_error: ‖f' − f‖ / ‖f‖ of the final features.
    """

    images: int
    kl: float | None
    agreement: float | None
    feature_cosine: float
    feature_relative_error: float

    @property
    def effect(self) -> float:
        """What candidates are compared by: the square of the feature error.

        It adds up over independent changes, and every image has its say in it; the KL of a hundred
        images hangs on the few that the model is unsure of (docs/measurements.md).
        """
        return self.feature_relative_error**2

    @property
    def loss(self) -> float:
        """What searches minimise: the KL, or the features' relative error without a head."""
        return self.feature_relative_error if self.kl is None else self.kl


Sums = list[float | None]
"""Of a batch, as JSON, so that other processes and later runs can add them: what ``compared`` or
``effects`` found."""


def compared(original: Observation, compressed: Observation) -> Sums:
    """The sums of one batch of images, in float64; the observations must be of equal shapes.

    Images, and the sums over them of KL and agreement (``None`` without a head), cosine and
    relative error.
    """
    before, after = exact(original.features), exact(compressed.features)
    cosine = float(torch.cosine_similarity(before, after, dim=1).sum())
    size = before.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    error = float(((after - before).norm(dim=1) / size).sum())
    if original.logits is None or compressed.logits is None:
        return [len(before), None, None, cosine, error]
    kl = float(kl_divergence(original.logits, compressed.logits).sum())
    same = original.logits.argmax(1) == compressed.logits.argmax(1)
    return [len(before), kl, float(same.sum()), cosine, error]


SOFT = 2.0
"""Temperature of the softmax whose KL is the effect of a single cut. The KL at temperature 1 of a
hundred images hangs on the few that the model is unsure of; in a softer one more have their say,
and plans depend less on which images were drawn (docs/measurements.md)."""


def effects(original: Observation, compressed: Observation) -> Sums:
    """The sums of one batch that the effect of a single cut is made of.

    Images, and the sums over them of the softened KL (``None`` without a head) and of the features'
    relative error.
    """
    images, kl, _, _, error = compared(original, compressed)
    if kl is not None and original.logits is not None and compressed.logits is not None:
        soft = kl_divergence(exact(original.logits) / SOFT, exact(compressed.logits) / SOFT)
        kl = SOFT**2 * float(soft.sum())
    return [images, kl, error]


def effect_of(sums: Sequence[Sums]) -> float:
    """What single cuts are compared by, from the sums of batches.

    The mean softened KL, or without a head the square of the mean relative error.
    """
    images = sum(batch[0] or 0 for batch in sums)
    soft, error = (sum(batch[i] or 0.0 for batch in sums) / max(images, 1) for i in (1, 2))
    return error**2 if any(batch[1] is None for batch in sums) else soft


class FidelityMeter:
    """Adds up batches, in float64."""

    def __init__(self) -> None:
        self.images = 0
        self._kl = self._same = self._cosine = self._error = 0.0
        self._has_head = True

    def add(self, original: Observation, compressed: Observation) -> None:
        """Compare two observations of the same images, of equal shapes."""
        self.add_sums(compared(original, compressed))

    def add_sums(self, sums: Sums) -> None:
        """Add what ``compared`` found."""
        images, kl, same, cosine, error = sums
        self.images += int(images or 0)
        self._cosine += cosine or 0.0
        self._error += error or 0.0
        if kl is None or same is None:
            self._has_head = False
            return
        self._kl += kl
        self._same += same

    def result(self) -> Fidelity:
        """The means so far."""
        n = max(self.images, 1)
        return Fidelity(
            images=self.images,
            kl=self._kl / n if self._has_head else None,
            agreement=self._same / n if self._has_head else None,
            feature_cosine=self._cosine / n,
            feature_relative_error=self._error / n,
        )


def kl_divergence(original: Tensor, compressed: Tensor) -> Tensor:
    """KL(softmax(original) ‖ softmax(compressed)) per image, in nats; logits are (n, classes)."""
    p = exact(original).log_softmax(1)
    q = exact(compressed).log_softmax(1)
    return (p.exp() * (p - q)).sum(1).clamp_min(0)
