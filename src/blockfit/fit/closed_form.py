"""From moments to maps: every solve is closed-form, in float64, and knows no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.maps import Linear, LowRank, PerTokenType, Scale, empty_map
from blockfit.fit.moments import Moments, Regression
from blockfit.fit.plan import Replacement

RIDGE = 1e-4
"""Default λ of the maps, relative to the mean diagonal of the scaled second moments.

Measured in docs/measurements.md; ``0`` is plain least squares.
"""


RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What ``choose_ridge`` tries."""


@dataclass(frozen=True)
class Affine:
    """``y ≈ A x + b`` in float64, whatever the kind of map it came from.

    Args:
        weight: A, shape (q, p).
        bias: b, shape (q,); zero where the kind has none.
    """

    weight: Tensor
    bias: Tensor

    def residual(self, problem: Regression) -> float:
        """Mean squared error per row on ``problem`` (Σ over channels), from its sums alone."""
        a, b, n = self.weight, self.bias, problem.count
        explained = (a @ problem.xx @ a.T).diagonal().sum() if a.ndim == 2 else 0.0
        total = (
            problem.yy.sum()
            + explained
            + n * b.square().sum()
            - 2 * (a.T * problem.xy).sum()
            - 2 * (b * problem.sum_y).sum()
            + 2 * (b * (a @ problem.sum_x)).sum()
        )
        return max(float(total) / n, 0.0)


def mean_square(problem: Regression) -> float:
    """Mean over rows of ‖y − ȳ‖²: what a constant would leave unexplained."""
    mean = problem.sum_y / problem.count
    return float((problem.yy / problem.count - mean.square()).clamp_min(0).sum())


def identity_error(problem: Regression) -> float:
    """Mean over rows of ‖y − x‖²: what dropping the span costs locally."""
    gap = problem.xx.diagonal() + problem.yy - 2 * problem.xy.diagonal()
    return max(float(gap.sum()) / problem.count, 0.0)


def _centred(problem: Regression) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariances of x and of (x, y), and both means.

    A channel that varies by less than a millionth of its size counts as constant: its variance is
    what rounding left of a difference of sums, and no map may build on it.
    """
    mean_x, mean_y = problem.sum_x / problem.count, problem.sum_y / problem.count
    cov_xx = (problem.xx / problem.count).sub_(torch.outer(mean_x, mean_x))
    cov_xy = problem.xy / problem.count - torch.outer(mean_x, mean_y)
    varies = (cov_xx.diagonal() > 1e-12 * problem.xx.diagonal() / problem.count).double()
    cov_xx.mul_(varies).mul_(varies[:, None])
    return cov_xx, cov_xy * varies[:, None], mean_x, mean_y


def ridge_solve(xx: Tensor, xy: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Solve ``min ‖Y − X W‖² + λ‖D (W − prior)‖²`` from second moments.

    Each channel of x is scaled to unit root mean square first (D), because the largest channel of
    a vision transformer is 7–39 times its median channel; λ is then relative to the mean diagonal.
    Where the matrix cannot be factored (fewer tokens than channels, λ = 0), the solution nearest
    to the prior is taken through an eigendecomposition.

    Args:
        xx: XᵀX / n, shape (p, p), float64.
        xy: XᵀY / n, shape (p, q), float64.
        prior: shape (p, q); what little data degrades to.
        ridge: λ ≥ 0.

    Returns:
        W of shape (p, q).

    Raises:
        BlockfitError: where λ is negative or the sums are not finite.
    """
    if not ridge >= 0:
        raise BlockfitError(f"the ridge must be 0 or more, got {ridge}")
    if not (torch.isfinite(xx).all() and torch.isfinite(xy).all()):
        raise BlockfitError(
            "the moments hold NaN or infinite values; check the calibration images and the model"
        )
    power = xx.diagonal().clamp_min(0)
    floor = power.max() * torch.finfo(torch.float64).eps
    scale = torch.where(power > floor, power, torch.ones_like(power)).sqrt()
    alive = (power > floor).double()
    gap = (xy - xx @ prior) / scale[:, None] * alive[:, None]
    damped = _scaled(xx, scale, alive)
    damped.diagonal().add_(ridge * alive + (1 - alive))
    factor, failed = torch.linalg.cholesky_ex(damped)
    # A factor whose diagonal nearly vanishes means a singular matrix in float64.
    singular = bool(failed) or float(factor.diagonal().min()) < 1e-7
    if singular:
        values, vectors = torch.linalg.eigh(_scaled(xx, scale, alive))
        values = values.clamp_min(0) + ridge
        cut = values.max() * len(values) * torch.finfo(torch.float64).eps * 16
        inverse = torch.where(values > cut, 1 / values.clamp_min(cut), torch.zeros_like(values))
        step = vectors @ (inverse[:, None] * (vectors.T @ gap))
    else:
        step = torch.cholesky_solve(gap, factor)
    return prior + step / scale[:, None] * alive[:, None]


def _scaled(xx: Tensor, scale: Tensor, alive: Tensor) -> Tensor:
    """Second moments of channels of unit root mean square; one matrix of memory, for wide MLPs."""
    scaled = xx / scale[:, None]
    return scaled.div_(scale).mul_(alive[:, None]).mul_(alive)


def fit_affine(
    problem: Regression, ridge: float, prior: Tensor | None = None, bias: bool = True
) -> Affine:
    """Least squares with a ridge towards ``prior`` (A's shape, (q, p); the identity by default)."""
    width_in, width_out = problem.xy.shape
    if prior is None:
        prior = torch.eye(width_out, width_in, dtype=torch.float64)
    prior = prior.cpu().double()
    if bias:
        xx, xy, mean_x, mean_y = _centred(problem)
        weight = ridge_solve(xx, xy, prior.T, ridge).T
        return Affine(weight, mean_y - weight @ mean_x)
    xx, xy = problem.xx / problem.count, problem.xy / problem.count
    weight = ridge_solve(xx, xy, prior.T, ridge).T
    return Affine(weight, torch.zeros(width_out, dtype=torch.float64))


def _fit_scale(problem: Regression, ridge: float) -> Affine:
    xx, xy, mean_x, mean_y = _centred(problem)
    variance, covariance = xx.diagonal(), xy.diagonal()
    damping = ridge * variance
    safe = torch.where(variance > 0, variance + damping, torch.ones_like(variance))
    factor = torch.where(variance > 0, (covariance + damping) / safe, torch.ones_like(variance))
    return Affine(torch.diag(factor), mean_y - factor * mean_x)


def _fit_orthogonal(problem: Regression, ridge: float) -> Affine:
    """Procrustes: the rotation Q that maximises tr(Qᵀ Cov(y, x)), with a ridge towards I.

    Of the rotations that the data cannot tell apart (fewer tokens than channels), a vanishing
    ridge takes the one nearest to I.
    """
    xx, xy, mean_x, mean_y = _centred(problem)
    variance = xx.diagonal()
    damping = torch.diag(ridge * variance + 1e-12 * variance.mean())
    left, _, right = torch.linalg.svd(xy.T + damping)
    rotation = left @ right
    return Affine(rotation, mean_y - rotation @ mean_x)


def _fit_low_rank(problem: Regression, ridge: float, rank: int) -> tuple[Affine, Tensor, Tensor]:
    """Reduced-rank regression of y − x on x: optimal for its rank in the metric of the fit.

    Returns the whole map and its factors U (q, rank) and V (rank, p). The correction is the full
    ridge solution projected on the leading eigenvectors of the fitted values' covariance
    (Izenman 1975).
    """
    full = fit_affine(problem, ridge)
    xx, _, mean_x, mean_y = _centred(problem)
    correction = full.weight - torch.eye(len(full.bias), dtype=torch.float64)
    damped = xx + torch.diag(ridge * xx.diagonal())
    fitted = correction @ damped @ correction.T
    _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    up = vectors[:, -rank:]
    down = up.T @ correction
    weight = torch.eye(len(full.bias), dtype=torch.float64) + up @ down
    return Affine(weight, mean_y - weight @ mean_x), up, down


def _one_map(
    replacement: Replacement, problem: Regression, ridge: float
) -> tuple[Affine, nn.Module]:
    kind, width = replacement.map, len(problem.sum_x)
    if kind == "scale":
        fitted = _fit_scale(problem, ridge)
        scale = Scale(width)
        scale.weight.data = fitted.weight.diagonal().float().clone()
        scale.bias.data = fitted.bias.float()
        return fitted, scale
    if kind == "low-rank":
        assert replacement.rank is not None
        fitted, up, down = _fit_low_rank(problem, ridge, replacement.rank)
        low = LowRank(width, replacement.rank)
        low.up.data, low.down.data = up.float(), down.float()
        low.bias.data = fitted.bias.float()
        return fitted, low
    if kind == "orthogonal":
        fitted = _fit_orthogonal(problem, ridge)
    else:
        fitted = fit_affine(problem, ridge, bias=kind == "affine")
    linear = Linear(width, bias=kind != "linear")
    linear.weight.data = fitted.weight.float()
    if linear.bias is not None:
        linear.bias.data = fitted.bias.float()
    return fitted, linear


def fit_map(
    replacement: Replacement,
    moments: Moments,
    ridge: float = RIDGE,
    prefix_weight: float = 1.0,
) -> nn.Module:
    """Fit the map of one replacement from moments: no second pass, no stored activations.

    Args:
        replacement: a span of ``moments`` and the kind of map.
        moments: the sums of the calibration images.
        ridge: λ of DESIGN.md, relative to the mean diagonal, pulling towards the identity;
            0 is plain least squares (the paper's linear map: arXiv 2410.04941, section 3).
        prefix_weight: weight of a prefix token where a patch token weighs 1.

    Returns:
        A float32 module on the CPU. ``folded`` gives an identity: its weights belong to the kept
        block before the span (``repair.py``).

    Raises:
        BlockfitError: where no moments were taken for the span, they are not finite, or the
            options do not fit the width or the tokens.
    """
    empty = empty_map(replacement, moments.width, moments.prefix_tokens)
    if replacement.map in ("identity", "folded"):
        return empty
    if not replacement.per_token_type:
        problem = moments.regression(replacement.span, prefix_weight=prefix_weight)
        return _one_map(replacement, problem, ridge)[1]
    prefix, patch = (
        _one_map(replacement, moments.regression(replacement.span, t), ridge)[1]
        for t in ("prefix", "patch")
    )
    return PerTokenType(prefix, patch, moments.prefix_tokens)


def map_error(
    replacement: Replacement,
    fitted_on: Moments,
    judged_on: Moments,
    ridge: float,
    prefix_weight: float = 1.0,
) -> float:
    """Mean squared error per token, on other moments, of the map that ``fitted_on`` gives."""
    span = replacement.span
    if not replacement.per_token_type:
        fitted = _one_map(replacement, fitted_on.regression(span, "all", prefix_weight), ridge)[0]
        return fitted.residual(judged_on.regression(span, "all", prefix_weight))
    total = count = 0.0
    for token_type, weight in (("prefix", prefix_weight), ("patch", 1.0)):
        fitted = _one_map(replacement, fitted_on.regression(span, token_type), ridge)[0]
        problem = judged_on.regression(span, token_type)
        total += weight * problem.count * fitted.residual(problem)
        count += weight * problem.count
    return total / count


def choose_ridge(
    replacement: Replacement, fitted_on: Moments, judged_on: Moments, prefix_weight: float = 1.0
) -> float:
    """The λ of ``RIDGES`` with the smallest error on ``judged_on``: from sums, without a pass."""
    errors = {
        ridge: map_error(replacement, fitted_on, judged_on, ridge, prefix_weight)
        for ridge in RIDGES
    }
    return min(errors, key=lambda ridge: (errors[ridge], -ridge))
