"""How alike the hidden states of all block boundaries are: tables from moments alone."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockfit.drawing import heat_map
from blockfit.errors import BlockfitError, need
from blockfit.fit.closed_form import fit_affine, mean_square
from blockfit.fit.moments import TOKEN_TYPES, Moments, Regression
from blockfit.fit.plan import Span

METRICS = ("mse", "cosine", "angular", "cka", "r2")
"""``mse``: mean squared difference per element, the paper's (arXiv 2410.04941, section 3);
``cosine`` and ``angular`` (angle / π): means over tokens; ``cka``: linear, centred (Kornblith et
al., arXiv 1905.00414, equation 4) with tokens as samples; ``r2``: share of the later state's
variance that the best affine map of the earlier one explains."""

SYMMETRIC = ("mse", "cosine", "angular", "cka")

CONSTANT = 1e-10
"""Below this variance relative to the mean square, tokens count as all the same: float32 rounding
leaves 1e-14. The class token at h[0] is such a case."""

_ITSELF = {"mse": 0.0, "cosine": 1.0, "angular": 0.0}

COLUMNS = ("metric", "token_type", "start", "stop", "value")
"""Of the tables in their long form, a row per cell."""

Table = list[list[float | None]]


@dataclass(frozen=True)
class Tables:
    """Block-to-block tables.

    Args:
        boundaries: the numbers l of the hidden states h[l], in the order of rows and columns.
        tokens: number of tokens of each type that were looked at.
        values: metric → token type → ``table[i][j]`` for ``boundaries[i]`` and ``boundaries[j]``.
            ``None`` where the metric is not defined: ``r2`` from a later state to an earlier one,
            ``cka`` and ``r2`` where all tokens are the same, pairs that were not measured.
    """

    boundaries: tuple[int, ...]
    tokens: dict[str, int]
    values: dict[str, dict[str, Table]]

    @property
    def token_types(self) -> tuple[str, ...]:
        """The token types that have tables."""
        return tuple(next(iter(self.values.values())))

    def at(self, metric: str, start: int, stop: int, token_type: str = "all") -> float | None:
        """One value, by the numbers of the boundaries.

        Raises:
            BlockfitError: where there is no such table or boundary.
        """
        try:
            table = self.values[metric][token_type]
            return table[self.boundaries.index(start)][self.boundaries.index(stop)]
        except (KeyError, ValueError):
            raise BlockfitError(
                f"there is no {metric} of {token_type} tokens between h[{start}] and h[{stop}]; "
                f"metrics are {', '.join(self.values)}, token types {', '.join(self.token_types)}, "
                f"boundaries {self.boundaries[0]}–{self.boundaries[-1]}"
            ) from None

    def rows(self) -> Iterator[tuple[str, str, int, int, float | None]]:
        """Every cell as (metric, token type, start, stop, value)."""
        for metric, types in self.values.items():
            for token_type, table in types.items():
                for start, line in zip(self.boundaries, table, strict=True):
                    for stop, value in zip(self.boundaries, line, strict=True):
                        if metric in SYMMETRIC or start <= stop:
                            yield metric, token_type, start, stop, value

    def to_json(self) -> dict[str, Any]:
        """The tables as plain JSON values."""
        return {
            "boundaries": list(self.boundaries),
            "tokens": dict(self.tokens),
            "metrics": self.values,
        }

    def write_csv(self, path: str | Path) -> None:
        """Long format, one line per cell: metric,token_type,start,stop,value.

        Undefined values are empty.
        """
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for *cell, value in self.rows():
                writer.writerow((*cell, "" if value is None else repr(value)))

    def draw(self, path: str | Path, title: str = "") -> None:
        """A picture: one row per token type, one column per metric; ``mse`` on a log scale.

        Raises:
            BlockfitError: where matplotlib is not installed.
        """
        types, metrics = self.token_types, tuple(self.values)
        width, height = 3.4 * len(metrics), 3.0 * len(types) + 0.5
        make = need("matplotlib.figure", "plots", "the picture").Figure
        figure = make(figsize=(width, height))
        edges = {
            "left": 0.7 / width,
            "right": 0.98,
            "bottom": 0.5 / height,
            "top": 1 - 0.8 / height,
        }
        room = {"wspace": 0.25, "hspace": 0.25}
        axes = figure.subplots(len(types), len(metrics), squeeze=False, gridspec_kw=edges | room)
        for row, token_type in enumerate(types):
            for column, metric in enumerate(metrics):
                axis = axes[row][column]
                heat_map(axis, self.boundaries, self.values[metric][token_type], metric == "mse")
                axis.set_title(f"{metric}, {token_type} tokens", fontsize=10)
                axis.set_ylabel("start" if column == 0 else "")
                axis.set_xlabel("stop" if row == len(types) - 1 else "")
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=110, format="png")


def tables(moments: Moments) -> Tables:
    """The tables of all pairs of boundaries that ``moments`` hold.

    Where only some of the patch tokens were taken, prefix tokens weigh as much less among ``all``.

    Args:
        moments: of every span between two boundaries (``spans_up_to(depth, depth)``).

    Raises:
        BlockfitError: where the moments hold no token.
    """
    return merged([part(moments)])


def part(moments: Moments) -> Tables:
    """``tables``, for moments of some of the pairs; ``merged`` puts such parts together."""
    found = {name: count for name, count in moments.tokens.items() if count}
    if not found:
        raise BlockfitError("the moments hold no tokens; add batches first")
    mixes = {"all": {"prefix": moments.patch_share, "patch": 1.0}}
    mixes |= {name: {name: 1.0} for name in TOKEN_TYPES}
    types = [name for name in (*TOKEN_TYPES, "all") if name == "all" or name in found]
    row = {boundary: i for i, boundary in enumerate(moments.boundaries)}
    values = {m: {t: _empty(len(row)) for t in types} for m in METRICS}
    for token_type in types:
        weights = {name: w for name, w in mixes[token_type].items() if name in found}
        for span in moments.spans:
            i, j = row[span.start], row[span.stop]
            for metric, value in compare(moments, span, weights).items():
                table = values[metric][token_type]
                table[i][j] = value
                if metric in SYMMETRIC:
                    table[j][i] = value
        for boundary, i in row.items():
            for metric, value in _itself(moments, boundary, weights).items():
                values[metric][token_type][i][i] = value
    return Tables(moments.boundaries, moments.tokens, values)


def compare(moments: Moments, span: Span, weights: Mapping[str, float]) -> dict[str, float | None]:
    """All metrics between h[start] and h[stop] of one span.

    Args:
        moments: which hold the span.
        span: start and stop.
        weights: token type → weight of one of its tokens; types that are left out do not count.
    """
    problem = _mixed(moments, span, weights)
    power_y, sum_y, count = _mixed_square(moments, span.stop, weights)
    total = sum(weight * moments.tokens[name] for name, weight in weights.items())
    angles = torch.zeros(2, dtype=torch.float64)
    for name, weight in weights.items():
        share = weight * moments.tokens[name] / total
        angles += share * torch.tensor(moments.angle(span, name), dtype=torch.float64)
    gap = problem.xx.diagonal() + problem.yy - 2 * problem.xy.diagonal()
    cov_xx, varies_x = _covariance(problem.xx, problem.sum_x, problem.count)
    cov_yy, varies_y = _covariance(power_y, sum_y, count)
    cov_xy = problem.xy / count - torch.outer(problem.sum_x, problem.sum_y) / count**2
    cka = None
    if varies_x and varies_y:
        cka = _within(float(cov_xy.square().sum() / (cov_xx.norm() * cov_yy.norm())))
    r2 = None
    if varies_y:
        left = fit_affine(problem, 0.0).residual(problem) if varies_x else mean_square(problem)
        r2 = _within(1 - left / mean_square(problem))
    return {
        "mse": max(float(gap.mean()) / count, 0.0),
        "cosine": float(angles[0]),
        "angular": float(angles[1]),
        "cka": cka,
        "r2": r2,
    }


def merged(parts: list[Tables]) -> Tables:
    """One set of tables from parts over the same images that hold different pairs."""
    boundaries = tuple(sorted({b for one in parts for b in one.boundaries}))
    types = parts[0].token_types
    values = {m: {t: _empty(len(boundaries)) for t in types} for m in METRICS}
    row = {boundary: i for i, boundary in enumerate(boundaries)}
    for one in parts:
        for metric, token_type, start, stop, value in one.rows():
            if value is not None:
                values[metric][token_type][row[start]][row[stop]] = value
    return Tables(boundaries, parts[0].tokens, values)


def _itself(
    moments: Moments, boundary: int, weights: Mapping[str, float]
) -> dict[str, float | None]:
    varies = _covariance(*_mixed_square(moments, boundary, weights))[1]
    return {**_ITSELF, "cka": 1.0 if varies else None, "r2": 1.0 if varies else None}


def _mixed(moments: Moments, span: Span, weights: Mapping[str, float]) -> Regression:
    problems = [moments.regression(span, name) * weight for name, weight in weights.items()]
    whole = problems[0]
    for problem in problems[1:]:
        whole = whole + problem
    return whole


def _mixed_square(
    moments: Moments, boundary: int, weights: Mapping[str, float]
) -> tuple[Tensor, Tensor, float]:
    sums = [(moments.second_moment(boundary, name), weight) for name, weight in weights.items()]
    square = torch.stack([weight * s[0] for s, weight in sums]).sum(0)
    linear = torch.stack([weight * s[1] for s, weight in sums]).sum(0)
    return square, linear, sum(weight * s[2] for s, weight in sums)


def _covariance(square: Tensor, linear: Tensor, count: float) -> tuple[Tensor, bool]:
    """The covariance, and whether the tokens differ at all."""
    mean = linear / count
    covariance = square / count - torch.outer(mean, mean)
    size = float(square.diagonal().sum()) / count
    return covariance, float(covariance.diagonal().sum()) > CONSTANT * size


def _within(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _empty(size: int) -> Table:
    return [[None] * size for _ in range(size)]
