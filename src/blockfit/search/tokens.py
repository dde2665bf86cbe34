"""Which tokens a repair is solved from, and the sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from blockfit.fit.moments import Regression
from blockfit.search.calibrate import drawn_tokens

ROWS_PER_INPUT = 6
"""Most tokens that a repair is solved from, per input of the layer (docs/measurements.md).

The products over an MLP's hidden activations cost more than the block itself; tokens of one image
are so alike that the prefix tokens and a part of the patch tokens say as much as all.
"""

NARROW_ROWS_PER_INPUT = 64
"""The same for narrowed parts, whose weights have no good values to stay near: all tokens of some
thousand images count (docs/measurements.md)."""

ROWS_AT_ONCE = 4096
"""Rows whose products are taken in one piece: adding up sums costs as much as some 700 rows."""


@dataclass(frozen=True)
class Draw:
    """The tokens of every image that a fit sees: all prefix tokens and some of the patch tokens.

    Args:
        prefix_tokens: leading tokens of an image.
        patches: patch tokens of an image.
        drawn: how many of these are drawn, by the image's place alone.
    """

    prefix_tokens: int
    patches: int
    drawn: int

    @classmethod
    def all(cls, prefix_tokens: int, tokens: int) -> Draw:
        """Every one of an image's tokens."""
        return cls(prefix_tokens, tokens - prefix_tokens, tokens - prefix_tokens)

    @classmethod
    def limited(
        cls, prefix_tokens: int, tokens: int, images: int, inputs: int, rows: int | None = None
    ) -> Draw:
        """As many as ``rows`` tokens per input of a layer allow; ``ROWS_PER_INPUT`` by default."""
        patches = tokens - prefix_tokens
        share = (rows or ROWS_PER_INPUT) * inputs / (tokens * images)
        drawn = max(min(1, patches), round(share * patches)) if share < 1 else patches
        return cls(prefix_tokens, patches, drawn)

    def take(self, states: Tensor, places: range) -> Tensor:
        """The drawn tokens of states (images, tokens, width), images at ``places`` of all."""
        if self.drawn == self.patches:
            return states
        picked = _positions(self, places)
        images = torch.arange(len(states), device=states.device)[:, None]
        return states[images, picked.to(states.device)]

    def weights(self, prefix_weight: float) -> Tensor | None:
        """Weight of every drawn token of an image; ``None`` where all weigh 1.

        Fewer patch tokens must not make the prefix tokens count for more.
        """
        prefix = prefix_weight * self.drawn / self.patches if self.patches else prefix_weight
        if prefix == 1.0 or self.prefix_tokens == 0:
            return None
        parts = torch.full((self.prefix_tokens,), prefix), torch.ones(self.drawn)
        return torch.cat(parts).double()


@lru_cache(maxsize=1024)
def _positions(draw: Draw, places: range) -> Tensor:
    """Positions of the drawn tokens, the same for every block: (images, prefix + drawn)."""
    return drawn_tokens(draw.prefix_tokens, draw.patches, draw.drawn, 0, places)


class RowSums:
    """The sums of one least-squares problem, of rows that come batch by batch.

    Args:
        inputs: width of x.
        outputs: width of y.
        weights: of the tokens of an image, shape (tokens,); ``None`` where all weigh 1.
        dtype: of the products; float32 suffices where a ridge bounds the condition number.
    """

    def __init__(
        self, inputs: int, outputs: int, weights: Tensor | None, dtype: torch.dtype
    ) -> None:
        self._total = Regression.zeros(inputs, outputs)
        self._weights, self._dtype = weights, dtype
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add x (images, tokens, inputs) and y (images, tokens, outputs)."""
        self._waiting.append((x, y))
        if sum(rows.shape[0] * rows.shape[1] for rows, _ in self._waiting) >= ROWS_AT_ONCE:
            self._multiply()

    def total(self) -> Regression:
        """The sums of all rows, over all processes of the run."""
        self._multiply()
        return self._total.over_ranks()

    def _multiply(self) -> None:
        if not self._waiting:
            return
        x, y = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        weights = None if self._weights is None else self._weights.repeat(len(x))
        self._total = self._total + Regression.of(x, y, self._dtype, weights)
