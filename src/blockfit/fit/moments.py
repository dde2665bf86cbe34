"""Running sums of hidden states: all that a fit needs, and all that is kept of the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import torch
from torch import Tensor

from blockfit import processes as ranks
from blockfit.errors import BlockfitError
from blockfit.fit.numerics import exact, full_float32
from blockfit.fit.plan import Span

TOKEN_TYPES = ("prefix", "patch")
"""Prefix tokens are class, distillation and register tokens; the others are patch tokens."""

BLOCK = 256
"""Columns that are multiplied at once where a product is symmetric: two thirds of the time."""


@dataclass(frozen=True)
class Regression:
    """The sums of one least-squares problem ``y ≈ A x + b``, in float64.

    Args:
        count: number of rows (tokens), weighted.
        sum_x: Σx, shape (p,).
        sum_y: Σy, shape (q,).
        xx: Σxxᵀ, shape (p, p).
        xy: Σxyᵀ, shape (p, q).
        yy: Σy∘y per channel, shape (q,).
    """

    count: float
    sum_x: Tensor
    sum_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        dtype: torch.dtype = torch.float64,
        weights: Tensor | None = None,
    ) -> Regression:
        """The sums of rows ``x`` (…, p) and ``y`` (…, q), multiplied in ``dtype``, kept in float64.

        float64 products keep 1e-6 relative accuracy of a plain least-squares fit where the
        covariance has a condition number of 1e9, as DINOv2's has at h[0]. float32 halves the time
        and is enough where a ridge bounds the condition number. ``weights``, shape (rows,), are
        those of the rows; all weigh 1 where there are none.
        """
        widen = exact if dtype == torch.float64 else lambda rows: rows.to(dtype)
        x, y = widen(x.reshape(-1, x.shape[-1])), widen(y.reshape(-1, y.shape[-1]))
        own = x, y
        if weights is not None:
            scale = weights.to(x)[:, None]
            own = x * scale, y * scale
        with full_float32(x.device):
            return cls(
                count=float(len(x) if weights is None else weights.sum()),
                sum_x=own[0].sum(0).cpu().double(),
                sum_y=own[1].sum(0).cpu().double(),
                xx=_square(own[0], x).cpu().double(),
                xy=(own[0].T @ y).cpu().double(),
                yy=(own[1] * y).sum(0).cpu().double(),
            )

    def __add__(self, other: Regression) -> Regression:
        return Regression(*map(add, vars(self).values(), vars(other).values()))

    @classmethod
    def zeros(cls, inputs: int, outputs: int) -> Regression:
        """The sums of no rows."""
        shapes = ((inputs,), (outputs,), (inputs, inputs), (inputs, outputs), (outputs,))
        return cls(0.0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def over_ranks(self) -> Regression:
        """The sums over all processes of the run."""
        return self if ranks.count() == 1 else Regression(*_of_all_ranks(**vars(self)))

    def __mul__(self, weight: float) -> Regression:
        return Regression(*(value * weight for value in vars(self).values()))


@dataclass(frozen=True)
class Spread:
    """Count, sum and second moments of rows, of every head of an attention, in float64.

    Args:
        count: number of rows, weighted.
        sum: Σx, shape (heads, m).
        xx: Σxxᵀ, shape (heads, m, m).
    """

    count: float
    sum: Tensor
    xx: Tensor

    @classmethod
    def of(cls, rows: Tensor, heads: int, dtype: torch.dtype = torch.float64) -> Spread:
        """The sums of ``rows``, shape (…, heads · m), multiplied in ``dtype``, kept in float64.

        float32 is for rows that are many and wide: what it leaves in directions without any
        variance is 1e-3 of the standard deviation of the largest.
        """
        rows = exact(rows) if dtype == torch.float64 else rows.to(dtype)
        x = rows.reshape(-1, heads, rows.shape[-1] // heads).transpose(0, 1)
        with full_float32(x.device):
            xx = _square(x[0], x[0])[None] if heads == 1 else x.transpose(1, 2) @ x
        return cls(float(x.shape[1]), x.sum(1).cpu().double(), xx.cpu().double())

    @classmethod
    def zeros(cls, heads: int, size: int) -> Spread:
        """The sums of no rows."""
        shapes = (heads, size), (heads, size, size)
        return cls(0.0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def __add__(self, other: Spread) -> Spread:
        return Spread(*map(add, vars(self).values(), vars(other).values()))

    def over_ranks(self) -> Spread:
        """The sums over all processes of the run."""
        return self if ranks.count() == 1 else Spread(*_of_all_ranks(**vars(self)))

    @property
    def mean(self) -> Tensor:
        """Shape (heads, m)."""
        return self.sum / self.count

    def second(self) -> Tensor:
        """Second moments about zero, shape (heads, m, m)."""
        return self.xx / self.count

    def covariance(self) -> Tensor:
        """Second moments about the mean, shape (heads, m, m)."""
        return self.second().sub_(self.mean[:, :, None] * self.mean[:, None, :])


def _of_all_ranks(count: float, **sums: Tensor) -> tuple[Any, ...]:
    """The sums over all processes of the run, in their order."""
    rows = torch.tensor([count], dtype=torch.float64)
    shared = [tensor.contiguous().clone() for tensor in sums.values()]
    ranks.reduce([rows, *shared])
    return float(rows), *shared


def _square(left: Tensor, x: Tensor) -> Tensor:
    """``leftᵀ x``, which is symmetric: what lies below the diagonal is not multiplied."""
    width = x.shape[1]
    if width < 2 * BLOCK:
        return left.T @ x
    out = x.new_empty(width, width)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        out[start:stop, start:] = left[:, start:stop].T @ x[:, start:]
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


class _TokenSums:
    """The sums of one token type over all states; everything float64, views of one tensor."""

    def __init__(self, states: int, width: int, pairs: Iterable[tuple[int, int]]) -> None:
        own = dict.fromkeys(pairs)
        square = width * width
        self.count = 0
        self.flat = torch.zeros(
            states * (width + square) + len(own) * (square + 2), dtype=torch.float64
        )
        parts = [states * width, states * square, len(own) * square, len(own) * 2]
        sums, squares, crosses, angles = self.flat.split(parts)
        self.sums = sums.view(states, width)
        self.squares = squares.view(states, width, width)
        self.crosses = dict(zip(own, crosses.view(-1, width, width), strict=True))
        self.angles = dict(zip(own, angles.view(-1, 2), strict=True))


class Moments:
    """n, Σx, Σy, Σxxᵀ and Σxyᵀ for a set of spans, separately for prefix and patch tokens.

    All spans share the sums of their boundaries, so memory is O(pairs · width²) float64 values,
    whatever the number of images or tokens. Sums of two runs add up to the sums of one
    (``merge``).

    Args:
        spans: the spans that a map may be fitted for later.
        width: channels of the hidden state.
        prefix_tokens: how many leading tokens are prefix tokens.
    """

    def __init__(self, spans: Iterable[Span], width: int, prefix_tokens: int) -> None:
        self.spans = tuple(sorted(set(spans)))
        if not self.spans:
            raise BlockfitError("no span to take moments for; give at least one span")
        self.width = width
        self.prefix_tokens = prefix_tokens
        self.boundaries = tuple(sorted({b for s in self.spans for b in (s.start, s.stop)}))
        self._row = {boundary: i for i, boundary in enumerate(self.boundaries)}
        self._pairs = [(self._row[s.start], self._row[s.stop]) for s in self.spans]
        self._partners: dict[int, list[int]] = {}
        for a, b in self._pairs:
            self._partners.setdefault(a, []).append(b)
        self._patches = 0
        states = len(self.boundaries)
        self._types = {t: _TokenSums(states, width, self._pairs) for t in TOKEN_TYPES}

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens of each type were added."""
        return {name: sums.count for name, sums in self._types.items()}

    def nbytes(self) -> int:
        """Memory of the sums in bytes."""
        return sum(sums.flat.nbytes for sums in self._types.values())

    @property
    def patch_share(self) -> float:
        """The part of the images' patch tokens that was added; 1 where all were."""
        return self._types["patch"].count / self._patches if self._patches else 1.0

    def add(self, hidden: Mapping[int, Tensor], patches: int | None = None) -> None:
        """Add a batch.

        Args:
            hidden: l → h[l] of shape (batch, tokens, width) for every boundary of the spans; the
                first ``prefix_tokens`` tokens are the prefix tokens.
            patches: how many patch tokens each image has, where only some of them are given;
                prefix tokens then weigh as much less among ``all`` tokens.

        Raises:
            BlockfitError: where a boundary is missing.
        """
        k = self.prefix_tokens
        missing = [b for b in self.boundaries if b not in hidden]
        if missing:
            raise BlockfitError(f"the batch holds no hidden state h[{missing[0]}]")
        images, given = hidden[self.boundaries[0]].shape[:2]
        self._patches += images * (given - k if patches is None else patches)
        for token_type, tokens in (("prefix", slice(0, k)), ("patch", slice(k, None))):
            rows = [exact(hidden[b][:, tokens].reshape(-1, self.width)) for b in self.boundaries]
            if len(rows[0]):
                self._add_rows(self._types[token_type], rows)

    def add_some(self, hidden: Mapping[int, Tensor], chosen: Tensor, patches: int) -> None:
        """Add some tokens of a batch, such as those that are no padding.

        Args:
            hidden: as in ``add``.
            chosen: which tokens are added, bool (batch, tokens).
            patches: how many patch tokens the batch has in all, without its padding.
        """
        k = self.prefix_tokens
        self._patches += patches
        for token_type, tokens in (("prefix", slice(0, k)), ("patch", slice(k, None))):
            own = chosen[:, tokens]
            rows = [exact(hidden[b][:, tokens][own.to(hidden[b].device)]) for b in self.boundaries]
            if len(rows[0]):
                self._add_rows(self._types[token_type], rows)

    def _add_rows(self, sums: _TokenSums, rows: Sequence[Tensor]) -> None:
        sums.count += len(rows[0])
        for i, left in enumerate(rows):
            partners = self._partners.get(i, [])
            # One product per state: its own square and all its crosses side by side.
            product = left.T @ torch.cat([left, *(rows[j] for j in partners)], dim=1)
            parts = product.cpu().split(self.width, dim=1)
            sums.sums[i] += left.sum(0).cpu()
            sums.squares[i] += parts[0]
            for j, part in zip(partners, parts[1:], strict=True):
                sums.crosses[i, j] += part
                cosine = torch.cosine_similarity(left, rows[j], dim=1).clamp(-1, 1)
                angle = torch.arccos(cosine) / torch.pi
                sums.angles[i, j] += torch.stack([cosine.sum(), angle.sum()]).cpu()

    def merge(self, other: Moments) -> None:
        """Add the sums of another run over the same spans.

        Raises:
            BlockfitError: where the two were not taken for the same spans, width and tokens.
        """
        if (self._row, self._pairs, self.width, self.prefix_tokens) != (
            other._row,
            other._pairs,
            other.width,
            other.prefix_tokens,
        ):
            raise BlockfitError(
                "moments of different spans, widths or token types cannot be added; take both alike"
            )
        self._patches += other._patches
        for name, mine in self._types.items():
            theirs = other._types[name]
            mine.count += theirs.count
            mine.flat += theirs.flat

    def state(self) -> tuple[list[int], dict[str, Tensor]]:
        """Counts and sums, to go on from after a stop."""
        counts = [self._patches, *(sums.count for sums in self._types.values())]
        return counts, {name: sums.flat for name, sums in self._types.items()}

    def restore(self, counts: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned of moments of the same spans.

        Raises:
            BlockfitError: where it was of others.
        """
        shapes = {name: sums.flat.shape for name, sums in self._types.items()}
        if {name: t.shape for name, t in tensors.items()} != shapes or len(counts) != 3:
            raise BlockfitError("the saved moments are of other spans or another width")
        self._patches = int(counts[0])
        for sums, count, flat in zip(
            self._types.values(), counts[1:], (tensors[name] for name in shapes), strict=True
        ):
            sums.count = int(count)
            sums.flat.copy_(flat)

    def reduce(self) -> None:
        """Add the sums of all processes of the run; all then hold the same."""
        if ranks.count() == 1:
            return
        ranks.reduce(sums.flat for sums in self._types.values())
        counts = ranks.gathered([self._patches, *(s.count for s in self._types.values())])
        self._patches, *tokens = (sum(column) for column in zip(*counts, strict=True))
        for sums, count in zip(self._types.values(), tokens, strict=True):
            sums.count = count

    def regression(
        self, span: Span, token_type: str = "all", prefix_weight: float = 1.0
    ) -> Regression:
        """The least-squares problem ``h[stop] ≈ A h[start] + b``.

        Args:
            span: one of ``spans``.
            token_type: ``prefix``, ``patch`` or ``all``.
            prefix_weight: weight of a prefix token, where a patch token weighs 1.

        Raises:
            BlockfitError: where no moments were taken for the span or no token was added.
        """
        return self._weighted(lambda sums: self._pair(sums, span), token_type, prefix_weight)

    def angle(self, span: Span, token_type: str = "all") -> tuple[float, float]:
        """Means over tokens of the cosine and the angle / π between h[start] and h[stop]."""
        weights = {"prefix": self.patch_share, "patch": 1.0}
        types = TOKEN_TYPES if token_type == "all" else (token_type,)
        pair = self._pair_of(span)
        count = sum(weights[t] * self._types[t].count for t in types)
        total = sum(weights[t] * self._types[t].angles[pair] for t in types)
        mean = torch.as_tensor(total) / max(count, 1e-12)
        return float(mean[0]), float(mean[1])

    def second_moment(self, boundary: int, token_type: str = "all") -> tuple[Tensor, Tensor, float]:
        """Σhhᵀ (width, width), Σh (width,) and the number of tokens of h[boundary]."""
        types = TOKEN_TYPES if token_type == "all" else (token_type,)
        row = self._row[boundary]
        sums = [self._types[t] for t in types]
        return (
            torch.stack([s.squares[row] for s in sums]).sum(0),
            torch.stack([s.sums[row] for s in sums]).sum(0),
            float(sum(s.count for s in sums)),
        )

    def of(self, span: Span) -> Moments:
        """These moments; those of ``shelf.GroupedMoments`` that hold ``span``."""
        return self

    def _pair_of(self, span: Span) -> tuple[int, int]:
        pair = (self._row.get(span.start, -1), self._row.get(span.stop, -1))
        if pair not in self._types["patch"].crosses:
            raise BlockfitError(
                f"no moments were taken for span {span}; name it when they are taken"
            )
        return pair

    def _pair(self, sums: _TokenSums, span: Span) -> Regression:
        i, j = self._pair_of(span)
        return Regression(
            float(sums.count),
            sums.sums[i],
            sums.sums[j],
            sums.squares[i],
            sums.crosses[i, j],
            torch.diagonal(sums.squares[j]),
        )

    def _weighted(
        self, problem: Callable[[_TokenSums], Regression], token_type: str, prefix_weight: float
    ) -> Regression:
        if token_type not in ("all", *TOKEN_TYPES):
            raise BlockfitError(f"unknown token type {token_type!r}; use prefix, patch or all")
        if token_type != "all":
            result = problem(self._types[token_type])
        else:
            weight = prefix_weight * self.patch_share
            result = problem(self._types["prefix"]) * weight + problem(self._types["patch"])
        if result.count <= 0:
            which = "tokens" if token_type == "all" else f"{token_type} tokens"
            raise BlockfitError(f"the moments hold no {which}; add batches first")
        return result
