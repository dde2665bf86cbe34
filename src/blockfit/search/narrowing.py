"""From sums over calibration images to the weights of a narrowed part, for one block at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from blockfit.fit.moments import Regression, Spread
from blockfit.fit.narrow import Basis, Kept, Removal, key_basis, remove_neurons, value_basis
from blockfit.fit.plan import Narrowing, Rows
from blockfit.models.narrowed import Layer, rows_in
from blockfit.models.padding import real_rows, without_padding

Layers = dict[str, Tensor]
"""Parameters of one block by their names inside it."""


def rows_of(layer: Layer, rows: Rows, count: int) -> tuple[Tensor, Tensor | None]:
    """Weight (count, inputs …) and bias (count,) of a run of rows, float64 on the CPU."""
    some = slice(rows.start, rows.start + count)
    weight = layer.weight.detach()[some].cpu().double()
    return weight, None if layer.bias is None else layer.bias.detach()[some].cpu().double()


class Rewritten:
    """The layers of one block whose rows are rewritten, run by run.

    Args:
        block: with its own layers in place.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._pieces: dict[str, list[tuple[int, int, Tensor, Tensor | None]]] = {}

    def put(self, rows: Rows, count: int, weight: Tensor, bias: Tensor | None) -> None:
        """Put other rows in the place of ``count`` rows of a layer."""
        self._pieces.setdefault(rows.layer, []).append((rows.start, count, weight, bias))

    def layers(self) -> Layers:
        """The parameters of all layers of which rows were put, whole."""
        out: Layers = {}
        for name, pieces in self._pieces.items():
            layer = self._block.get_submodule(name)
            assert isinstance(layer, Layer)
            at = 0
            weights: list[Tensor] = []
            biases: list[Tensor | None] = []
            for start, count, weight, bias in sorted(pieces, key=lambda piece: piece[0]):
                self._keep(layer, at, start, weights, biases)
                weights.append(weight)
                biases.append(bias)
                at = start + count
            self._keep(layer, at, rows_in(layer), weights, biases)
            out[f"{name}.weight"] = torch.cat(weights).to(layer.weight)
            if layer.bias is not None:
                known = [bias for bias in biases if bias is not None]
                out[f"{name}.bias"] = torch.cat(known).to(layer.bias)
        return out

    @staticmethod
    def _keep(
        layer: Layer,
        start: int,
        stop: int,
        weights: list[Tensor],
        biases: list[Tensor | None],
    ) -> None:
        if stop > start:
            weight, bias = rows_of(layer, Rows("", start), stop - start)
            weights.append(weight)
            biases.append(bias)


def put_keys(into: Rewritten, block: nn.Module, cut: Narrowing, bases: Sequence[Basis]) -> None:
    """New rows of queries and keys, of the basis of every head."""
    for rows, side in zip(cut.rows, ("left", "right"), strict=True):
        _put_heads(into, block, cut, rows, [getattr(basis, side) for basis in bases])


def put_values(into: Rewritten, block: nn.Module, cut: Narrowing, bases: Sequence[Basis]) -> None:
    """New rows of values, of the basis of every head."""
    _put_heads(into, block, cut, cut.rows[0], [basis.left for basis in bases])


def _put_heads(
    into: Rewritten, block: nn.Module, cut: Narrowing, rows: Rows, bases: list[Tensor]
) -> None:
    layer = block.get_submodule(rows.layer)
    assert isinstance(layer, nn.Linear)
    weight, bias = rows_of(layer, rows, cut.heads * cut.size)
    turn = torch.stack([basis[:, : cut.kept].T for basis in bases])  # (heads, kept, size)
    new = turn @ weight.unflatten(0, (cut.heads, cut.size))
    shift = None
    if bias is not None:
        shift = (turn @ bias.unflatten(0, (cut.heads, cut.size))[..., None]).flatten()
    into.put(rows, cut.heads * cut.size, new.flatten(0, 1), shift)


def key_bases(queries: Spread, keys: Spread) -> list[Basis]:
    """Of every head; keys are sums about the mean of each image's."""
    pairs = zip(queries.second(), keys.second(), strict=True)
    return [key_basis(one, other) for one, other in pairs]


def value_bases(mixed: Spread, weight: Tensor) -> list[Basis]:
    """Of every head.

    Args:
        mixed: what the output projection reads.
        weight: of the output projection with its gain, shape (d, heads · m), float64.
    """
    heads = len(mixed.xx)
    rows = weight.T.unflatten(0, (heads, -1))
    return [value_basis(c, o) for c, o in zip(mixed.covariance(), rows, strict=True)]


def narrowed_values(cut: Narrowing, bases: Sequence[Basis], mixed: Tensor) -> Tensor:
    """What the narrower output projection reads, from what the whole one reads.

    Args:
        cut: of values.
        mixed: shape (images, tokens, heads · size).

    Returns:
        shape (images, tokens, heads · kept).
    """
    turn = torch.stack([basis.left[:, : cut.kept] for basis in bases]).to(mixed)
    return torch.einsum(
        "...hm,hmr->...hr", mixed.unflatten(-1, (cut.heads, cut.size)), turn
    ).flatten(-2)


def values_prior(cut: Narrowing, bases: Sequence[Basis]) -> Tensor:
    """The output projection that goes with ``narrowed_values``, shape (d, heads · kept)."""
    return torch.cat([basis.right[: cut.kept] for basis in bases]).T


def neurons_removed(sums: Regression | Spread, weight: Tensor, widths: Collection[int]) -> Removal:
    """The order of removal from sums over what an MLP's writer reads.

    Args:
        sums: of the neurons as x.
        weight: of the writer with its gain, shape (d, p), float64.
        widths: where the kept neurons are wanted.
    """
    if isinstance(sums, Spread):
        covariance = sums.covariance()[0]
    else:
        mean = sums.sum_x / sums.count
        covariance = (sums.xx / sums.count).sub_(torch.outer(mean, mean))
    return remove_neurons(covariance, weight.T.contiguous(), widths)


def put_neurons(into: Rewritten, block: nn.Module, cut: Narrowing, kept: Kept) -> None:
    """The rows of the layers before an MLP's neurons that stay."""
    for rows in cut.rows:
        layer = block.get_submodule(rows.layer)
        assert isinstance(layer, Layer)
        weight, bias = rows_of(layer, rows, cut.size)
        bias = None if bias is None else bias[kept.neurons]
        into.put(rows, cut.size, weight[kept.neurons], bias)


def of_some(problem: Regression, inputs: Tensor) -> Regression:
    """The same least-squares problem with some of its inputs only."""
    return replace(
        problem,
        sum_x=problem.sum_x[inputs],
        xx=problem.xx[inputs][:, inputs],
        xy=problem.xy[inputs],
    )


def centred(keys: Tensor, real: Tensor | None = None) -> Tensor:
    """Keys about their mean over each image: what all have in common cancels in the softmax.

    Shape (images or windows, tokens, heads · m); the tokens may be a map. Of padded texts
    (``real`` says which tokens are no padding) those of real tokens, (tokens of all, heads · m).
    """
    if real is not None:
        counts = real.sum(1).clamp_min(1).to(keys)[:, None, None]
        means = without_padding(keys, real).sum(1, keepdim=True) / counts
        return real_rows(keys - means, real)
    return keys - keys.mean(dim=tuple(range(1, keys.ndim - 1)), keepdim=True)
