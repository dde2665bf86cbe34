"""Published ways to remove an MLP's neurons without training: baselines, from their formulas.

- ``corp``: CORP (arXiv 2602.05243). Neurons of least energy × active rate go; they are modelled as
  an affine function of the others by ridge regression, folded into the layer that reads them.
- ``vbp``: Variance-Based Pruning (arXiv 2507.12988). Neurons of least variance go; their means go
  into the bias of the layer that reads them.
- ``magnitude``: group magnitude as in Torch-Pruning (arXiv 2301.12900). Neurons of least L2 norm
  over all weights that make or read them go; nothing makes up for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockfit.fit.moments import Spread

BASELINES = ("corp", "vbp", "magnitude")

ACTIVE_ABOVE = 0.01
"""CORP: a neuron is active where it exceeds this part of the layer's root mean square."""

LEAST_RIDGE = 1e-3
"""CORP: the ridge where shrinkage asks for less."""


def active_above(spread: Spread) -> float:
    """The absolute value above which a neuron of a layer counts as active."""
    return ACTIVE_ABOVE * float(spread.second()[0].diagonal().mean().sqrt())


def energy_by_activity(spread: Spread, active: Tensor) -> Tensor:
    """CORP's score of every neuron.

    Args:
        active: over how many rows each was active, shape (p,).
    """
    return spread.second()[0].diagonal() * active / spread.count


def variance(spread: Spread) -> Tensor:
    """Variance-Based Pruning's score of every neuron."""
    return spread.covariance()[0].diagonal()


def group_magnitude(makes: Sequence[Tensor], reads: Tensor) -> Tensor:
    """Torch-Pruning's score of every neuron: the mean square norm over the weights of its group.

    Args:
        makes: rows that make the neurons, each of shape (p, inputs).
        reads: the layer that reads them, shape (d, p).
    """
    groups = [*(rows.square().sum(1) for rows in makes), reads.square().sum(0)]
    return torch.stack(groups).mean(0)


def kept_of(scores: Tensor, count: int) -> Tensor:
    """The numbers of the ``count`` neurons of highest score, ascending."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def shrinkage_ridge(covariance: Tensor, count: float) -> float:
    """The ridge that oracle-approximating shrinkage adds (Chen et al., arXiv 0907.4698).

    Args:
        covariance: of the regressors, shape (k, k).
        count: rows that it is of.
    """
    k, trace, square = len(covariance), covariance.trace(), covariance.square().sum()
    above = (1 - 2 / k) * square + trace**2
    below = (count + 1 - 2 / k) * (square - trace**2 / k)
    share = 1.0 if below <= 0 else min(1.0, float(above / below))
    return max(LEAST_RIDGE, share * float(trace) / k)


def folded_neurons(
    spread: Spread, weight: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """CORP's compensation: the weight of the kept neurons and the bias, ``x_gone ≈ B x_kept + c``.

    Without a bias there is no place for ``c``, and the regression has no constant.

    Args:
        weight: that reads them, shape (d, p), float64.
        bias: of the same layer, shape (d,).
        kept: numbers of the neurons that stay, from ``kept_of``.
    """
    gone = _others(spread, kept)
    matrix = (spread.second() if bias is None else spread.covariance())[0]
    among = matrix[kept][:, kept]
    ridge = shrinkage_ridge(among, spread.count) * torch.eye(len(kept), dtype=among.dtype)
    b = torch.linalg.solve(among + ridge, matrix[kept][:, gone]).T
    mean = spread.mean[0]
    shift = None if bias is None else bias + weight[:, gone] @ (mean[gone] - b @ mean[kept])
    return weight[:, kept] + weight[:, gone] @ b, shift


def mean_into_bias(
    spread: Spread, weight: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Variance-Based Pruning's compensation; arguments as in ``folded_neurons``."""
    gone = _others(spread, kept)
    shift = None if bias is None else bias + weight[:, gone] @ spread.mean[0][gone]
    return weight[:, kept], shift


def _others(spread: Spread, kept: Tensor) -> Tensor:
    stays = torch.zeros(spread.sum.shape[1], dtype=torch.bool)
    stays[kept] = True
    return (~stays).nonzero()[:, 0]
