"""Published baselines against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from test_narrow import correlated
from torch import Tensor

from blockfit.fit.moments import Spread
from blockfit.fit.published import (
    LEAST_RIDGE,
    active_above,
    energy_by_activity,
    folded_neurons,
    group_magnitude,
    kept_of,
    mean_into_bias,
    shrinkage_ridge,
    variance,
)

ROWS = correlated(400, 10) + torch.linspace(-2, 2, 10, dtype=torch.float64)
KEPT = torch.tensor([0, 3, 4, 8])
GONE = [1, 2, 5, 6, 7, 9]


def layer(d: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(d, 10, generator=generator, dtype=torch.float64)
    return weight, torch.randn(d, generator=generator, dtype=torch.float64)


def lstsq(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Ridge regression as plain least squares with rows √(n λ) I added."""
    extra = (len(x) * ridge) ** 0.5 * np.eye(x.shape[1])
    a = np.concatenate([x.numpy(), extra])
    b = np.concatenate([y.numpy(), np.zeros((x.shape[1], y.shape[1]))])
    return torch.as_tensor(np.linalg.lstsq(a, b, rcond=None)[0])


@pytest.mark.parametrize("with_bias", [True, False])
def test_corp_adds_what_least_squares_makes_of_the_removed_neurons(with_bias: bool) -> None:
    weight, bias = layer()
    spread = Spread.of(ROWS, 1)
    new, shift = folded_neurons(spread, weight, bias if with_bias else None, KEPT)
    mean = ROWS.mean(0) if with_bias else torch.zeros(10, dtype=torch.float64)
    x, y = (ROWS - mean)[:, KEPT], (ROWS - mean)[:, GONE]
    ridge = shrinkage_ridge(x.T @ x / len(x), len(x))
    told = (ROWS[:, KEPT] - mean[KEPT]) @ lstsq(x, y, ridge) + mean[GONE]
    expected = ROWS[:, KEPT] @ weight[:, KEPT].T + told @ weight[:, GONE].T
    found = ROWS[:, KEPT] @ new.T
    if with_bias:
        assert shift is not None
        expected, found = expected + bias, found + shift
    else:
        assert shift is None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - (ROWS @ weight.T + with_bias * bias)).norm() < (
        ROWS[:, GONE] @ weight[:, GONE].T
    ).norm()


def test_the_ridge_is_what_shrinkage_takes_from_the_diagonal() -> None:
    """scikit-learn's OAS gives the share ρ; the ridge is ρ times the mean variance."""
    x = ROWS[:30].numpy()
    covariance = np.cov(x.T, bias=True)
    shrunk = OAS().fit(x).covariance_
    share = 1 - shrunk[0, 1] / covariance[0, 1]
    # scikit-learn leaves the 2/p terms of the formula away; with p = 10 that changes a tenth.
    found = shrinkage_ridge(torch.as_tensor(covariance), 30)
    assert found == pytest.approx(share * np.trace(covariance) / 10, rel=0.15)
    assert shrinkage_ridge(1e-9 * torch.as_tensor(covariance), 30) == LEAST_RIDGE
    assert shrinkage_ridge(torch.eye(4, dtype=torch.float64), 30) == 1.0


def test_energy_counts_by_how_often_a_neuron_is_active() -> None:
    rows = torch.tensor([[2.0, 1.0, 0.01], [0.0, 1.0, 0.01], [0.0, 1.0, 0.01], [0.0, 1.0, 0.01]])
    spread = Spread.of(rows, 1)
    least = active_above(spread)
    assert least == pytest.approx(0.01 * float(rows.square().mean().sqrt()))
    active = (rows.abs() > least).sum(0).double()
    # Equal energies of 1; the first neuron fires for one row in four.
    torch.testing.assert_close(
        energy_by_activity(spread, active), torch.tensor([0.25, 1.0, 1e-4]).double()
    )


def test_variance_does_not_see_the_mean() -> None:
    shifted = ROWS + 5 * torch.arange(10)
    torch.testing.assert_close(
        variance(Spread.of(shifted, 1)), ROWS.var(0, correction=0), rtol=1e-3, atol=1e-3
    )


def test_variance_based_pruning_keeps_the_mean_of_the_output() -> None:
    weight, bias = layer()
    new, shift = mean_into_bias(Spread.of(ROWS, 1), weight, bias, KEPT)
    assert torch.equal(new, weight[:, KEPT])
    assert shift is not None
    before, after = ROWS @ weight.T + bias, ROWS[:, KEPT] @ new.T + shift
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-5, atol=1e-5)


def test_the_smallest_groups_of_weights_go_first() -> None:
    """By hand: rows of squared norms 1, 25, 4 and columns of 9, 0, 16 add up to 10, 25, 20."""
    makes = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    reads = torch.tensor([[0.0, 0.0, 4.0], [3.0, 0.0, 0.0]])
    scores = group_magnitude([makes], reads)
    assert scores.tolist() == [5.0, 12.5, 10.0]
    assert kept_of(scores, 2).tolist() == [1, 2]
    # With a gate of norms 20, 0, 0 beside them the third neuron is the smallest.
    gate = torch.tensor([[20.0**0.5], [0.0], [0.0]])
    assert kept_of(group_magnitude([makes, gate], reads), 2).tolist() == [0, 1]
