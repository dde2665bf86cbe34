"""Narrowing: which dimensions of a part go, and what the kept ones do in their place.

Tensors in, tensors out; every product and factorisation is in float64. An MLP's neurons are removed
one group after the other by the optimal brain surgeon's rule for whole rows (Hassibi and Stork,
1993; for rows as in SparseGPT, arXiv 2301.00774); values and queries–keys, with nothing nonlinear
between the two factors of a product, by the best low rank in the metric of the data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from blockfit.errors import BlockfitError

ORDER_RIDGE = 1e-2
"""λ of the order of removal, relative to the mean diagonal of the covariance."""

GROUPS = 48
"""In so many groups all neurons of an MLP would go; the order is found again after each."""


@dataclass(frozen=True)
class Kept:
    """Neurons that stay, and the weights by which they make up for the others.

    Args:
        neurons: their numbers, ascending, shape (k,).
        weight: what stands in the place of their rows, shape (k, d), float64.
    """

    neurons: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Removal:
    """The order in which an MLP's neurons go.

    Args:
        errors: width → the error that it leaves: mean over tokens of ‖Σ removed‖², compensated.
        kept: for the widths that were asked for.
    """

    errors: dict[int, float]
    kept: dict[int, Kept]


def remove_neurons(
    covariance: Tensor,
    weight: Tensor,
    widths: Collection[int],
    *,
    ridge: float = ORDER_RIDGE,
    step: int | None = None,
) -> Removal:
    """Remove neurons in groups of least damage, the others compensating.

    With H = C + λ · mean(diag C) · I, removing the set S costs ``tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S)``, and
    the best that the others can do is ``W ← W − H⁻¹[:, S] ((H⁻¹)_SS)⁻¹ W_S``. The smallest width
    asked for ends the removal.

    Args:
        covariance: C of the neurons after their activation, shape (p, p), float64.
        weight: rows by which they are written, LayerScale in, shape (p, d), float64.
        widths: where the kept neurons and their weights are wanted, 1 … p.
        ridge: λ.
        step: neurons per group; p / ``GROUPS`` by default.

    Raises:
        BlockfitError: where a width is not within 1 … p, or the covariance is not finite.
    """
    p = len(covariance)
    wanted = sorted(set(widths), reverse=True)
    if not wanted or wanted[-1] < 1 or wanted[0] > p:
        raise BlockfitError(f"an MLP of {p} neurons can keep 1 to {p}, not {wanted or 'none'}")
    if not torch.isfinite(covariance).all():
        raise BlockfitError(
            "the covariance of an MLP's neurons is not finite; check the calibration images"
        )
    step = max(1, p // GROUPS) if step is None else step
    mean = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped = covariance.clone()
    damped.diagonal().add_(ridge * mean)
    factor = torch.linalg.cholesky(damped)
    del damped  # of a wide MLP, each of these matrices takes hundreds of megabytes
    surgeon = _Surgeon(torch.cholesky_inverse(factor), weight.clone())
    del factor
    errors, kept, total, left = {p: 0.0}, {}, 0.0, p
    for target in wanted:
        while left > target:
            group = min(step, left - target)
            total += surgeon.remove(group)
            left -= group
            errors[left] = total
        kept[target] = surgeon.kept()
    return Removal(errors, kept)


class _Surgeon:
    """The neurons that stay so far, with their rows and H⁻¹; all is changed in place.

    Copying H⁻¹ without a group takes longer than bringing it up to date, so those that went stay
    in it until they are an eighth.
    """

    def __init__(self, inverse: Tensor, rows: Tensor) -> None:
        self._inverse, self._rows = inverse, rows
        self._neurons = torch.arange(len(rows))
        self._here = torch.ones(len(rows), dtype=torch.bool)

    def remove(self, count: int) -> float:
        """Remove the neurons of least damage; the damage that they do together."""
        damage = self._rows.square().sum(1) / self._inverse.diagonal()
        gone = damage.masked_fill(~self._here, torch.inf).argsort(stable=True)[:count]
        across, rows = self._inverse[gone], self._rows[gone]
        width = rows.shape[1]
        solved = torch.linalg.solve(across[:, gone], torch.cat([rows, across], dim=1))
        self._rows.addmm_(across.T, solved[:, :width], alpha=-1)
        self._inverse.addmm_(across.T, solved[:, width:], alpha=-1)
        self._here[gone] = False
        if 8 * int(self._here.sum()) <= 7 * len(self._here):
            self._compact()
        return float((rows * solved[:, :width]).sum())

    def kept(self) -> Kept:
        """The neurons that stay, and their rows."""
        return Kept(self._neurons[self._here], self._rows[self._here])

    def _compact(self) -> None:
        stays = self._here.nonzero()[:, 0]
        self._inverse = self._inverse[stays][:, stays]
        self._rows, self._neurons = self._rows[stays], self._neurons[stays]
        self._here = torch.ones(len(stays), dtype=torch.bool)


def _root(second: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment, shape (m, m), and its pseudo-inverse.

    Directions whose variance is what the rounding of float32 activations leaves have none.
    """
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp_min(0)
    floor = values.max() * len(values) * (4 * torch.finfo(torch.float32).eps) ** 2
    root = values.sqrt()
    inverse = torch.where(values > floor, 1 / root.clamp_min(1e-300), torch.zeros_like(root))
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD; the largest entry of each left vector is positive, on any machine."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    largest = u.abs().argmax(0, keepdim=True)
    signs = torch.where(u.gather(0, largest)[0] < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, s, vh * signs[:, None]


@dataclass(frozen=True)
class Basis:
    """The best low rank of a product of two factors, for every rank at once.

    The factors ``left`` and ``right`` are those of full rank; the first r columns of each are
    the best of rank r.

    Args:
        left: shape (m, m); applied to the first factor's dimensions.
        right: shape (m, n); applied to the second's.
        errors: error of keeping r dimensions at place r, shape (m + 1,).
    """

    left: Tensor
    right: Tensor
    errors: Tensor


def value_basis(covariance: Tensor, weight: Tensor) -> Basis:
    """The best low rank of a head's values and output: SVD of ``C^½ O = U S Vᵀ``.

    New values are ``leftᵀ v``, new output rows the rows of ``right``, scaled so that the columns of
    ``left`` are about 1 long; the error is the mean over tokens of the squared change of what the
    head writes.

    Args:
        covariance: of the mixed values that the output projection reads, shape (m, m), float64.
        weight: the head's rows of the output projection, LayerScale in, shape (m, d), float64.

    Returns:
        left (m, m), right (m, d) and the errors of all ranks.
    """
    root, inverse = _root(covariance)
    u, s, vh = _svd(root @ weight)
    m = len(weight)
    short = m - len(s)  # fewer outputs than dimensions: the rest is never needed
    u = torch.cat([u, torch.zeros(m, short, dtype=u.dtype)], dim=1)
    right = torch.cat([s[:, None] * vh, torch.zeros(short, weight.shape[1], dtype=u.dtype)])
    left = inverse @ u
    scale = _power_of_two(1 / left.norm(dim=0))
    return Basis(left * scale, right / scale[:, None], _tails(s, m))


def key_basis(queries: Tensor, keys: Tensor) -> Basis:
    """The best low rank of a head's logits ``q · k``: SVD of ``G_q^½ G_k^½ = U S Vᵀ``.

    New queries are ``leftᵀ q``, new keys ``rightᵀ k``, the columns of both about equally long; the
    error is the mean squared change of a logit of independent queries and keys. What all keys of
    an image have in common cancels in the softmax, so that ``keys`` should be taken about their
    mean over the image.

    Args:
        queries: second moment of the head's queries (about zero), shape (m, m), float64.
        keys: second moment of its keys, shape (m, m), float64.

    Returns:
        left and right, both (m, m), and the errors of all ranks.
    """
    root_q, inverse_q = _root(queries)
    root_k, inverse_k = _root(keys)
    u, s, vh = _svd(root_q @ root_k)
    half = s.sqrt()
    left, right = inverse_q @ u * half, inverse_k @ vh.T * half
    scale = _power_of_two((right.norm(dim=0) / left.norm(dim=0)).sqrt())
    return Basis(left * scale, right / scale, _tails(s, len(queries)))


def _power_of_two(factors: Tensor) -> Tensor:
    """The nearest powers of two, which change no digit of what they scale; 1 where there is none.

    Directions of little variance would otherwise get weights that half precision cannot hold.
    """
    usable = torch.isfinite(factors) & (factors > 0)
    return torch.where(usable, factors, torch.ones_like(factors)).log2().round().exp2()


def _tails(singular: Tensor, size: int) -> Tensor:
    """Σ of the squares after the first r singular values, for r = 0 … size."""
    squares = torch.zeros(size, dtype=torch.float64)
    squares[: len(singular)] = singular.square()
    tails = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])
