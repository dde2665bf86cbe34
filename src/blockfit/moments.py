"""Running sums of hidden states: all that a fit needs, and all that is kept of the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockfit.errors import BlockfitError
from blockfit.spans import Span

TOKEN_TYPES = ("prefix", "patch")
"""Prefix tokens are class, distillation and register tokens; the others are patch tokens."""


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
    def of(cls, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float64) -> Regression:
        """The sums of rows ``x`` (…, p) and ``y`` (…, q), multiplied in ``dtype``, kept in float64.

        float64 products keep 1e-6 relative accuracy of a plain least-squares fit where the
        covariance has a condition number of 1e9, as DINOv2's has at h[0]. float32 halves the time
        and is enough where a ridge bounds the condition number.
        """
        x = x.reshape(-1, x.shape[-1]).to(dtype)
        y = y.reshape(-1, y.shape[-1]).to(dtype)
        return cls(
            count=float(len(x)),
            sum_x=x.sum(0).cpu().double(),
            sum_y=y.sum(0).cpu().double(),
            xx=(x.T @ x).cpu().double(),
            xy=(x.T @ y).cpu().double(),
            yy=y.square().sum(0).cpu().double(),
        )

    def __add__(self, other: Regression) -> Regression:
        return Regression(
            self.count + other.count,
            self.sum_x + other.sum_x,
            self.sum_y + other.sum_y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def __mul__(self, weight: float) -> Regression:
        return Regression(
            self.count * weight,
            self.sum_x * weight,
            self.sum_y * weight,
            self.xx * weight,
            self.xy * weight,
            self.yy * weight,
        )


class _TokenSums:
    """The sums of one token type over all states; everything float64."""

    def __init__(self, states: int, width: int, pairs: Iterable[tuple[int, int]]) -> None:
        self.count = 0
        self.sums = torch.zeros(states, width, dtype=torch.float64)
        self.squares = torch.zeros(states, width, width, dtype=torch.float64)
        self.crosses = {pair: torch.zeros(width, width, dtype=torch.float64) for pair in pairs}

    def tensors(self) -> list[Tensor]:
        return [self.sums, self.squares, *self.crosses.values()]


class Moments:
    """n, Σx, Σy, Σxxᵀ and Σxyᵀ for a set of spans, separately for prefix and patch tokens.

    All spans share the sums of their boundaries, so memory is O(pairs · width²) float64 values,
    whatever the number of images or tokens. Sums of two runs add up to the sums of one
    (``merge``).

    Args:
        spans: the spans that a map may be fitted for later.
        width: channels of the hidden state.
        prefix_tokens: how many leading tokens are prefix tokens.
        contributions: also take the MLP's contribution to each span's first state, which
            ``folded`` maps are fitted from (``h[start] = r + m``; the sums of m).
    """

    def __init__(
        self, spans: Iterable[Span], width: int, prefix_tokens: int, contributions: bool = False
    ) -> None:
        self.spans = tuple(sorted(set(spans)))
        if not self.spans:
            raise BlockfitError("no span to take moments for; give at least one span")
        self.width = width
        self.prefix_tokens = prefix_tokens
        self.contributions = contributions
        boundaries = sorted({b for s in self.spans for b in (s.start, s.stop)})
        states: list[tuple[str, int]] = [("h", b) for b in boundaries]
        pairs = [(("h", s.start), ("h", s.stop)) for s in self.spans]
        if contributions:
            foldable = [s for s in self.spans if s.start > 0]
            starts = sorted({s.start for s in foldable})
            states += [("m", b) for b in starts]
            pairs += [(("m", b), ("h", b)) for b in starts]
            pairs += [(("m", s.start), ("h", s.stop)) for s in foldable]
        self._row = {state: i for i, state in enumerate(states)}
        self._pairs = sorted({(self._row[a], self._row[b]) for a, b in pairs})
        self._partners: dict[int, list[int]] = {}
        for a, b in self._pairs:
            self._partners.setdefault(a, []).append(b)
        self._types = {t: _TokenSums(len(states), width, self._pairs) for t in TOKEN_TYPES}

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The l of the hidden states h[l] that the spans touch."""
        return tuple(b for name, b in self._row if name == "h")

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens of each type were added."""
        return {name: sums.count for name, sums in self._types.items()}

    def nbytes(self) -> int:
        """Memory of the sums in bytes."""
        return sum(t.nbytes for s in self._types.values() for t in s.tensors())

    def add(
        self, hidden: Mapping[int, Tensor], mlp: Mapping[int, Tensor] | None = None
    ) -> None:
        """Add a batch.

        Args:
            hidden: l → h[l] of shape (batch, tokens, width) for every boundary; the first
                ``prefix_tokens`` tokens are the prefix tokens.
            mlp: l → the contribution of block l − 1's MLP to h[l], same shape; needed where
                ``contributions`` was asked for.
        """
        k = self.prefix_tokens
        values = []
        for name, boundary in self._row:
            source = hidden if name == "h" else (mlp or {})
            if boundary not in source:
                raise BlockfitError(f"the batch holds no state {name}[{boundary}]")
            values.append(source[boundary])
        for token_type, tokens in (("prefix", slice(0, k)), ("patch", slice(k, None))):
            rows = [v[:, tokens].reshape(-1, self.width).double() for v in values]
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
            raise BlockfitError("moments of different spans, widths or token types cannot be added")
        for name, mine in self._types.items():
            theirs = other._types[name]
            mine.count += theirs.count
            for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
                a += b

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
        return self._weighted(
            lambda sums: self._pair(sums, ("h", span.start), ("h", span.stop), span),
            token_type,
            prefix_weight,
        )

    def folded_regression(self, span: Span, prefix_weight: float = 1.0) -> Regression:
        """The problem ``h[stop] - r ≈ A m + b`` with ``h[start] = r + m``, m the MLP's part."""
        if not self.contributions or span.start == 0:
            raise BlockfitError(f"no moments of MLP contributions were taken for span {span}")

        def problem(sums: _TokenSums) -> Regression:
            to_stop = self._pair(sums, ("m", span.start), ("h", span.stop), span)
            to_start = self._pair(sums, ("m", span.start), ("h", span.start), span)
            direct = self._pair(sums, ("h", span.start), ("h", span.stop), span)
            own = torch.diagonal(to_stop.xx)
            # y - r = y - x + m, so its sums follow from those of m, x and y.
            cross_diagonals = (
                torch.diagonal(to_stop.xy) - torch.diagonal(direct.xy) - torch.diagonal(to_start.xy)
            )
            x_squares = torch.diagonal(direct.xx)
            return Regression(
                to_stop.count,
                to_stop.sum_x,
                to_stop.sum_y - to_start.sum_y + to_stop.sum_x,
                to_stop.xx,
                to_stop.xy - to_start.xy + to_stop.xx,
                to_stop.yy + x_squares + own + 2 * cross_diagonals,
            )

        return self._weighted(problem, "all", prefix_weight)

    def states(self, left: int, right: int, token_type: str = "all") -> tuple[Regression, Tensor]:
        """Sums of the pair (h[left], h[right]) and Σyyᵀ, for similarity tables.

        ``left == right`` is allowed; other pairs must be boundaries of one of ``spans``.
        """
        row = self._row[("h", right)]
        if left == right:
            span = None
        else:
            span = Span(left, right)
        types = TOKEN_TYPES if token_type == "all" else (token_type,)
        square = torch.stack([self._types[t].squares[row] for t in types]).sum(0)

        def problem(sums: _TokenSums) -> Regression:
            if span is not None:
                return self._pair(sums, ("h", left), ("h", right), span)
            xx = sums.squares[row]
            return Regression(
                sums.count, sums.sums[row], sums.sums[row], xx, xx, torch.diagonal(xx).clone()
            )

        return self._weighted(problem, token_type, 1.0), square

    def _pair(
        self, sums: _TokenSums, left: tuple[str, int], right: tuple[str, int], span: Span
    ) -> Regression:
        try:
            i, j = self._row[left], self._row[right]
            cross = sums.crosses[i, j]
        except KeyError:
            raise BlockfitError(f"no moments were taken for span {span}") from None
        return Regression(
            float(sums.count),
            sums.sums[i],
            sums.sums[j],
            sums.squares[i],
            cross,
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
            result = problem(self._types["prefix"]) * prefix_weight + problem(self._types["patch"])
        if result.count <= 0:
            raise BlockfitError(f"the moments hold no {token_type} tokens; add batches first")
        return result
