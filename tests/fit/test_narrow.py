"""Narrowing's mathematics against independent computations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockfit.errors import BlockfitError
from blockfit.fit.narrow import key_basis, remove_neurons, value_basis


def correlated(n: int, p: int, seed: int = 0) -> Tensor:
    """Rows of correlated columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, p, generator=generator, dtype=torch.float64) / p**0.5
    scales = torch.logspace(-1, 1, p, dtype=torch.float64)
    return (torch.randn(n, p, generator=generator, dtype=torch.float64) @ mixing) * scales


def covariance_of(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.T @ x / len(x)


def damped(covariance: Tensor, ridge: float) -> Tensor:
    p = len(covariance)
    return covariance + ridge * covariance.diagonal().mean() * torch.eye(p, dtype=torch.float64)


@pytest.mark.parametrize("step", [1, 3])
def test_kept_neurons_take_the_weights_that_least_squares_gives_them(step: int) -> None:
    covariance = covariance_of(correlated(200, 12))
    weight = torch.randn(12, 5, dtype=torch.float64)
    removal = remove_neurons(covariance, weight, [7, 4], ridge=1e-2, step=step)
    hessian = damped(covariance, 1e-2)
    for width in (7, 4):
        kept = removal.kept[width]
        assert len(kept.neurons) == width
        among = hessian[kept.neurons][:, kept.neurons]
        expected = torch.linalg.solve(among, hessian[kept.neurons] @ weight)
        torch.testing.assert_close(kept.weight, expected, rtol=1e-8, atol=1e-10)
        gap = weight.clone()
        gap[kept.neurons] -= expected
        left = (gap * (hessian @ gap)).sum()
        assert removal.errors[width] == pytest.approx(float(left), rel=1e-8)


def test_the_first_neuron_to_go_is_the_one_whose_loss_the_others_make_up_for_best() -> None:
    x = correlated(300, 6)
    x = torch.cat([x, x[:, :1] + x[:, 1:2]], dim=1)  # a neuron that two others can replace
    covariance, weight = covariance_of(x), torch.ones(7, 3, dtype=torch.float64)
    hessian = damped(covariance, 1e-2)

    def damage(gone: int) -> float:
        others = [i for i in range(7) if i != gone]
        among = hessian[others][:, others]
        solved = torch.linalg.solve(among, hessian[others] @ weight)
        gap = weight.clone()
        gap[others] -= solved
        return float((gap * (hessian @ gap)).sum())

    removal = remove_neurons(covariance, weight, [6], step=1)
    gone = (set(range(7)) - set(removal.kept[6].neurons.tolist())).pop()
    assert gone == min(range(7), key=damage)
    assert removal.errors[6] == pytest.approx(damage(gone), rel=1e-8)


def test_errors_grow_as_neurons_go_and_nothing_is_lost_at_full_width() -> None:
    covariance = covariance_of(correlated(200, 20))
    weight = torch.randn(20, 4, dtype=torch.float64)
    removal = remove_neurons(covariance, weight, [20, 1], step=2)
    errors = [removal.errors[w] for w in sorted(removal.errors, reverse=True)]
    assert errors[0] == 0.0
    assert errors == sorted(errors)
    assert torch.equal(removal.kept[20].weight, weight)


def test_neurons_that_never_fire_go_first_and_cost_nothing() -> None:
    x = correlated(200, 8)
    x[:, [2, 5]] = 0.3  # constant: the bias can take them over
    weight = torch.randn(8, 3, dtype=torch.float64)
    removal = remove_neurons(covariance_of(x), weight, [6], ridge=1e-6, step=1)
    assert set(removal.kept[6].neurons.tolist()) == {0, 1, 3, 4, 6, 7}
    assert removal.errors[6] < 1e-4


@pytest.mark.parametrize("width", [0, 9])
def test_widths_that_an_mlp_cannot_have_are_refused(width: int) -> None:
    with pytest.raises(BlockfitError, match="can keep 1 to 8"):
        remove_neurons(torch.eye(8, dtype=torch.float64), torch.ones(8, 2).double(), [width])


def test_a_covariance_that_is_not_finite_is_refused() -> None:
    covariance = torch.full((4, 4), float("nan"), dtype=torch.float64)
    with pytest.raises(BlockfitError, match="not finite"):
        remove_neurons(covariance, torch.ones(4, 2).double(), [2])


def test_the_rank_of_values_loses_least_of_what_the_head_writes() -> None:
    z = correlated(500, 6)
    covariance, weight = covariance_of(z), torch.randn(6, 9, dtype=torch.float64)
    basis = value_basis(covariance, weight)
    written = (z - z.mean(0)) @ weight
    for rank in range(7):
        product = basis.left[:, :rank] @ basis.right[:rank]
        error = ((z - z.mean(0)) @ (weight - product)).square().sum() / len(z)
        assert float(basis.errors[rank]) == pytest.approx(float(error), abs=1e-9)
        # Eckart and Young: the tail of the singular values of what is written.
        tail = torch.linalg.svdvals(written)[rank:].square().sum() / len(z)
        assert float(error) == pytest.approx(float(tail), abs=1e-9)


def test_a_head_with_dimensions_that_never_vary_keeps_its_product() -> None:
    z = correlated(300, 5)
    z[:, 3] = 0
    basis = value_basis(covariance_of(z), torch.randn(5, 4, dtype=torch.float64))
    assert torch.isfinite(basis.left).all()
    assert float(basis.errors[4]) == pytest.approx(0, abs=1e-12)


def test_full_rank_queries_and_keys_have_the_same_products() -> None:
    q, k = correlated(400, 6, 1), correlated(400, 6, 2)
    basis = key_basis(q.T @ q / len(q), k.T @ k / len(k))
    torch.testing.assert_close((q @ basis.left) @ (k @ basis.right).T, q @ k.T)
    assert float(basis.errors[6]) == 0.0


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_of_a_rank_is_that_of_the_logits_of_independent_pairs(rank: int) -> None:
    q, k = correlated(400, 6, 1), correlated(300, 6, 2)
    basis = key_basis(q.T @ q / len(q), k.T @ k / len(k))
    logits = q @ k.T  # every query with every key: independent
    found = (q @ basis.left[:, :rank]) @ (k @ basis.right[:, :rank]).T
    error = (found - logits).square().mean()
    assert float(basis.errors[rank]) == pytest.approx(float(error), rel=1e-8)
    tail = torch.linalg.svdvals(logits)[rank:].square().sum() / logits.numel()
    assert float(error) == pytest.approx(float(tail), rel=1e-8)


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e-14])
def test_new_weights_are_of_moderate_size_however_little_the_data_vary(spread: float) -> None:
    """Half precision holds numbers up to 65,504."""
    q, k = correlated(400, 6, 1), spread * correlated(400, 6, 2)
    basis = key_basis(q.T @ q / len(q), k.T @ k / len(k))
    torch.testing.assert_close((q @ basis.left) @ (k @ basis.right).T, q @ k.T)
    lengths = torch.stack([basis.left.norm(dim=0), basis.right.norm(dim=0)])
    assert 0.1 < float(lengths.min()) <= float(lengths.max()) < 10
    values = value_basis(covariance_of(k), torch.randn(6, 9, dtype=torch.float64))
    assert 0.5 < float(values.left.norm(dim=0).min()) <= float(values.left.norm(dim=0).max()) < 2
