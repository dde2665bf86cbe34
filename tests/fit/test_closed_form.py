"""Fits from moments against independent solvers on the stored activations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from families import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.closed_form import (
    RIDGES,
    Affine,
    choose_ridge,
    fit_affine,
    fit_map,
    identity_error,
    map_error,
    mean_square,
    ridge_solve,
)
from blockfit.fit.maps import PerTokenType
from blockfit.fit.moments import Moments, Regression
from blockfit.fit.plan import Replacement, Span

WIDTH, ROWS = 16, 600
SPAN = Span(0, 2)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def channels(kind: str, rows: int = ROWS) -> Tensor:
    """Hidden states with the habits of real ones, shape (rows, width)."""
    x = random(rows, WIDTH)
    if kind == "outliers":
        x[:, 3] *= 1e4
        x[:, 7] += 1e4
    elif kind == "constant":
        x[:, 3], x[:, 5], x[:, 9] = 3.3, 0.0, 1e6 / 3
    elif kind == "rank-deficient":
        x[:, 8:] = x[:, :8] @ random(8, 8, seed=5)
    elif kind == "correlated":
        x = (x * torch.logspace(0, -3, WIDTH)) @ random(WIDTH, WIDTH, seed=6)
    elif kind == "huge":
        x *= 1e12
    elif kind == "tiny":
        x *= 1e-12
    return x


def answers(x: Tensor, noise: float = 0.3) -> Tensor:
    """Targets near x, as a residual stream's are: y = x + B x + c + noise, per channel's size."""
    size = x.square().mean(0).sqrt().clamp_min(float(x.abs().max()) * 1e-20)
    change = (x / size) @ random(WIDTH, WIDTH, seed=2) / WIDTH**0.5
    return x + size.median() * (change + random(WIDTH, seed=3) + noise * random(*x.shape, seed=4))


def lstsq(x: Tensor, y: Tensor, bias: bool) -> Tensor:
    """Fitted values of plain least squares in float64, by SVD of the activations themselves."""
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    regressors = torch.cat([x, ones], 1) if bias else x
    size = regressors.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    solution = torch.linalg.lstsq(regressors / size, y, driver="gelsd").solution
    return (regressors / size) @ solution


def predicted(fitted: Affine, x: Tensor) -> Tensor:
    return x @ fitted.weight.T + fitted.bias


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def taken(x: Tensor, y: Tensor, prefix_tokens: int = 0) -> Moments:
    """Moments of one span, of states with 10 tokens per image."""
    moments = Moments([SPAN], x.shape[-1], prefix_tokens)
    moments.add({0: x.reshape(-1, 10, x.shape[-1]), 2: y.reshape(-1, 10, x.shape[-1])})
    return moments


def mapped(kind: str, x: Tensor, y: Tensor, ridge: float, rank: int | None = None) -> nn.Module:
    return fit_map(Replacement(SPAN, kind, rank), taken(x, y), ridge)


KINDS = ["plain", "outliers", "constant", "rank-deficient", "correlated", "huge", "tiny"]


@pytest.mark.parametrize("bias", [False, True], ids=["linear", "affine"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_ridge_the_fit_is_plain_least_squares(kind: str, bias: bool) -> None:
    x = channels(kind)
    y = answers(x)
    fitted = fit_affine(Regression.of(x, y), 0.0, bias=bias)
    # Relative to what there is to predict: y itself may be one huge channel.
    got, expected = predicted(fitted, x) - x, lstsq(x, y, bias) - x
    size = answers(x).sub(x).norm(dim=0)
    assert float(((got - expected).norm(dim=0) / size).max()) < 1e-6


@pytest.mark.parametrize("bias", [False, True], ids=["linear", "affine"])
def test_the_weights_are_those_of_scikit_learn(bias: bool) -> None:
    x = channels("outliers")
    y = answers(x)
    known = LinearRegression(fit_intercept=bias).fit(x.numpy(), y.numpy())
    fitted = fit_affine(Regression.of(x, y), 0.0, bias=bias)
    size = x.square().mean(0).sqrt()
    assert relative(fitted.weight, torch.as_tensor(known.coef_)) < 1e-6
    assert relative(fitted.weight * size, torch.as_tensor(known.coef_) * size) < 1e-6


@pytest.mark.parametrize("prior", ["identity", "given"])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_the_ridge_is_that_of_scikit_learn_on_channels_of_unit_size(
    ridge: float, prior: str
) -> None:
    """min ‖y − x W‖² + λ n ‖D (W − prior)‖², with D the standard deviations and a free bias."""
    x = channels("outliers")
    y = answers(x)
    start = torch.eye(WIDTH).double() if prior == "identity" else random(WIDTH, WIDTH, seed=8)
    size = x.std(0, correction=0)
    known = Ridge(alpha=ridge * ROWS, solver="svd").fit(
        (x / size).numpy(), (y - x @ start.T).numpy()
    )
    fitted = fit_affine(Regression.of(x, y), ridge, prior=start)
    expected = start + torch.as_tensor(known.coef_) / size
    assert relative((fitted.weight - start) * size, (expected - start) * size) < 1e-6


def test_one_problem_may_have_other_channels_in_than_out() -> None:
    """As the output weights of an MLP: hidden activations in, hidden state out."""
    x, y = random(ROWS, 2 * WIDTH), random(ROWS, WIDTH, seed=1)
    fitted = fit_affine(Regression.of(x, y), 0.0, prior=random(WIDTH, 2 * WIDTH, seed=2))
    assert fitted.weight.shape == (WIDTH, 2 * WIDTH)
    assert relative(predicted(fitted, x), lstsq(x, y, bias=True)) < 1e-6


def test_channels_that_never_vary_keep_the_identity() -> None:
    """Only the rounding of the sums is left of their variance; nothing may be built on it."""
    x = channels("constant")
    y = answers(x)
    unit = torch.eye(WIDTH).double()
    for kind in ("affine", "scale", "low-rank"):
        for ridge in (0.0, 1e-4):
            module = mapped(kind, x, y, ridge, rank=WIDTH if kind == "low-rank" else None)
            shift = module(torch.zeros(1, 1, WIDTH))
            weight = (module(torch.eye(WIDTH)[None]) - shift)[0].T
            for channel in (3, 5, 9):
                gap = weight[:, channel] - unit[:, channel]
                assert gap.abs().max() < 0.1, (kind, ridge, channel)  # float32 of 1e6 / 3
    affine = fit_affine(Regression.of(x, y), 0.0)
    torch.testing.assert_close(affine.weight[:, [3, 5, 9]], unit[:, [3, 5, 9]])


@pytest.mark.parametrize("kind", ["scale", "orthogonal", "linear", "affine", "low-rank"])
@pytest.mark.parametrize("outliers", [False, True])
def test_few_tokens_give_the_identity_and_never_noise(kind: str, outliers: bool) -> None:
    """10 tokens of 64 channels, y a noisy x: with a ridge, what the data cannot say stays x."""
    width = 64
    x = random(10, width)
    if outliers:
        x[:, 3] *= 1e4
    y = x + 0.1 * random(10, width, seed=1)
    rank = 16 if kind == "low-rank" else None
    module = mapped(kind, x, y, ridge=1e-2, rank=rank).double()
    new = random(1000, width, seed=2) * x.std(0)
    change = (module(new[None])[0] - new) / x.std(0)
    assert change.isfinite().all()
    assert change.square().mean().sqrt() < 0.2  # dropping the block: 0.1; noise: 1 and more


@pytest.mark.parametrize("kind", ["scale", "linear", "affine"])
def test_an_endless_ridge_gives_the_identity(kind: str) -> None:
    x = channels("plain")
    y = 3 * x + 1
    module = mapped(kind, x, y, ridge=1e9)
    change = module(x.float()[None])[0] - x
    # Only the bias, which is free, is left.
    assert change.std(0).max() < 1e-5


def test_one_token_or_no_variance_is_solved_too() -> None:
    x = random(10, WIDTH)[:1].expand(10, WIDTH)
    for kind in ("scale", "orthogonal", "linear", "affine"):
        for ridge in (0.0, 1e-4):
            module = mapped(kind, x, x + 1, ridge)
            torch.testing.assert_close(module(x.float()), (x + 1).float(), rtol=1e-4, atol=1e-4)
            assert mapped(kind, 0 * x, 0 * x, ridge)(x.float()).isfinite().all()


def test_scale_is_one_regression_per_channel() -> None:
    x = channels("outliers")
    y = answers(x)
    module = mapped("scale", x, y, ridge=0.0)
    for c in range(WIDTH):
        slope, shift = np.polyfit(x[:, c].numpy(), y[:, c].numpy(), 1)
        assert module.weight[c].item() == pytest.approx(slope, rel=1e-5, abs=1e-5)
        assert module.bias[c].item() == pytest.approx(shift, rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("kind", ["plain", "outliers"])
def test_orthogonal_is_procrustes_on_centred_data(kind: str) -> None:
    x = channels(kind)
    y = answers(x)
    module = mapped("orthogonal", x, y, ridge=0.0).double()
    q = module.weight.detach()
    torch.testing.assert_close(q.T @ q, torch.eye(WIDTH).double(), rtol=0, atol=1e-5)
    known, _ = scipy.linalg.orthogonal_procrustes((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy())
    torch.testing.assert_close(q, torch.as_tensor(known.T), rtol=0, atol=1e-5)
    assert relative(module(x).mean(0), y.mean(0)) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_is_the_best_of_its_rank(rank: int) -> None:
    """Against alternating least squares over U and V from several starts."""
    width = 6
    x = random(200, width) @ random(width, width, seed=1)
    y = x + x @ random(width, width, seed=2) + random(200, width, seed=3)
    module = fit_map(Replacement(SPAN, "low-rank", rank), taken(x, y), ridge=0.0).double()
    assert torch.linalg.matrix_rank(module.up @ module.down) == rank
    error = (module(x) - y).square().sum().item()

    centred, target = x - x.mean(0), (y - x) - (y - x).mean(0)
    found = []
    for start in range(3):
        up = random(width, rank, seed=10 + start)
        for _ in range(300):
            inner = torch.linalg.lstsq(up, target.T).solution.T  # best U for this V, and back
            down = torch.linalg.lstsq(centred, inner).solution
            up = torch.linalg.lstsq(centred @ down, target).solution.T
        found.append(float((centred @ down @ up.T - target).square().sum()))
    assert error == pytest.approx(min(found), rel=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_low_rank_of_full_rank_is_affine_and_more_rank_never_hurts(ridge: float) -> None:
    x = channels("outliers")
    y = answers(x)
    full = mapped("low-rank", x, y, ridge, rank=WIDTH).double()
    assert relative(full(x) - x, mapped("affine", x, y, ridge).double()(x) - x) < 1e-3
    errors = [
        float((mapped("low-rank", x, y, 0.0, rank).double()(x) - y).square().sum().detach())
        for rank in range(1, WIDTH + 1)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    "kind", ["scale", "orthogonal", "linear", "affine", "low-rank", "identity"]
)
def test_the_map_of_a_span_is_no_worse_than_identity_on_its_own_data(kind: str) -> None:
    x = channels("plain")
    y = answers(x)
    module = mapped(kind, x, y, 0.0, rank=3 if kind == "low-rank" else None)
    error = float((module(x.float()).double() - y).square().sum(1).mean().detach())
    dropped = float((x - y).square().sum(1).mean())
    assert identity_error(Regression.of(x, y)) == pytest.approx(dropped)
    assert error == pytest.approx(dropped) if kind == "identity" else error < dropped


@given(st.integers(0, 1000), st.sampled_from([0.0, 1e-3, 10.0]))
@settings(max_examples=20)
def test_errors_follow_from_the_sums_alone(seed: int, ridge: float) -> None:
    x = random(40, 5, seed=seed)
    y = random(40, 5, seed=seed + 1) + 2
    problem = Regression.of(x, y)
    fitted = fit_affine(problem, ridge)
    expected = (predicted(fitted, x) - y).square().sum(1).mean()
    assert fitted.residual(problem) == pytest.approx(float(expected))
    assert mean_square(problem) == pytest.approx(float((y - y.mean(0)).square().sum(1).mean()))
    assert fitted.residual(problem) <= mean_square(problem) + identity_error(problem)


def test_prefix_and_patch_tokens_can_have_a_map_each() -> None:
    x = random(400, WIDTH)
    y = answers(x).reshape(-1, 10, WIDTH)
    y[:, :1] = -2 * y[:, :1]
    images = x.reshape(-1, 10, WIDTH)
    moments = taken(x, y.reshape(-1, WIDTH), prefix_tokens=1)
    module = fit_map(Replacement(SPAN, "affine", per_token_type=True), moments, ridge=0.0)
    assert isinstance(module, PerTokenType)
    out = module(images.float()).double()
    for tokens in (slice(0, 1), slice(1, None)):
        rows, target = images[:, tokens].reshape(-1, WIDTH), y[:, tokens].reshape(-1, WIDTH)
        assert relative(out[:, tokens].reshape(-1, WIDTH), lstsq(rows, target, bias=True)) < 1e-5


def test_the_weight_of_prefix_tokens_counts_in_the_fit() -> None:
    """Weight w is what w copies of each prefix token would give, by scikit-learn's weights."""
    x = random(400, WIDTH)
    y = x.clone()
    y.reshape(-1, 10, WIDTH)[:, :2] *= 3
    weights = torch.ones(40, 10)
    weights[:, :2] = 7.5
    known = LinearRegression().fit(x.numpy(), y.numpy(), sample_weight=weights.flatten().numpy())
    module = fit_map(Replacement(SPAN, "affine"), taken(x, y, 2), ridge=0.0, prefix_weight=7.5)
    assert relative(module.weight.detach(), torch.as_tensor(known.coef_)) < 1e-5


@pytest.mark.parametrize("split", [False, True], ids=["one map", "per token type"])
@pytest.mark.parametrize("kind", ["scale", "orthogonal", "linear", "affine", "low-rank"])
def test_the_ridge_is_chosen_by_the_true_error_on_other_images(kind: str, split: bool) -> None:
    """30 noisy tokens of 16 channels to fit on; the maps are run on 400 others to judge them."""
    rows = channels("plain", 430)
    targets = answers(rows, noise=2.0)
    entry = Replacement(SPAN, kind, 4 if kind == "low-rank" else None, split)
    fitted_on = taken(rows[:30], targets[:30], prefix_tokens=2)
    judged_on = taken(rows[30:], targets[30:], prefix_tokens=2)
    errors = {}
    for ridge in RIDGES:
        module = fit_map(entry, fitted_on, ridge).double()
        out = module(rows[30:].reshape(-1, 10, WIDTH)).reshape(-1, WIDTH)
        errors[ridge] = (out - targets[30:]).square().sum(1).mean().item()
        got = map_error(entry, fitted_on, judged_on, ridge)
        assert got == pytest.approx(errors[ridge], rel=1e-4)
    chosen = choose_ridge(entry, fitted_on, judged_on)
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-6)
    if kind in ("linear", "affine"):
        assert errors[chosen] < errors[0.0]


def test_what_cannot_be_fitted_is_refused() -> None:
    x = random(40, WIDTH)
    moments = taken(x, x)
    with pytest.raises(BlockfitError, match="the ridge must be 0 or more, got -1"):
        fit_map(Replacement(SPAN, "affine"), moments, ridge=-1)
    with pytest.raises(BlockfitError, match="no moments were taken for span 1:2"):
        fit_map(Replacement(Span(1, 2), "affine"), moments)
    with pytest.raises(BlockfitError, match="rank 17 of span 0:2 is larger than the model's width"):
        fit_map(Replacement(SPAN, "low-rank", WIDTH + 1), moments)
    with pytest.raises(BlockfitError, match="0:2 asks for one map per token type, but the model"):
        fit_map(Replacement(SPAN, "affine", per_token_type=True), moments)
    with pytest.raises(BlockfitError, match="the moments hold NaN or infinite values"):
        fit_map(Replacement(SPAN, "affine"), taken(x, x * float("inf")))
    with pytest.raises(BlockfitError, match="the ridge must be 0 or more, got nan"):
        ridge_solve(x.T @ x, x.T @ x, torch.eye(WIDTH).double(), float("nan"))
