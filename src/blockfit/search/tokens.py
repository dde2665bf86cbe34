"""Which tokens a repair is solved from, and the sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from blockfit.fit.moments import Regression
from blockfit.search.calibrate import drawn_of_real, drawn_tokens

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
        share: of an image's own patch tokens, however many it has, that are drawn; by the image's
            place alone.
    """

    prefix_tokens: int
    share: float = 1.0

    @classmethod
    def limited(cls, prefix_tokens: int, tokens: int, inputs: int, rows: int | None = None) -> Draw:
        """As many as ``rows`` tokens per input of a layer allow; ``ROWS_PER_INPUT`` by default.

        ``tokens`` are those of all images together.
        """
        return cls(prefix_tokens, min(1.0, (rows or ROWS_PER_INPUT) * inputs / tokens))

    def drawn(self, patches: int) -> int:
        """How many patch tokens are drawn of an image with so many."""
        if self.share >= 1.0:
            return patches
        return max(min(1, patches), round(self.share * patches))

    def take(self, states: Tensor, places: range, real: Tensor | None = None) -> Tensor:
        """The drawn tokens of states (images, tokens, width), images at ``places`` of all.

        Of padded texts (``real`` says which of their tokens are no padding) the drawn tokens of
        all come in one row, shape (1, drawn, width).
        """
        if real is not None:
            texts, tokens = self._of_real(real, places)
            return states[texts.to(states.device), tokens.to(states.device)][None]
        patches = states.shape[1] - self.prefix_tokens
        if self.drawn(patches) == patches:
            return states
        picked = _positions(self.prefix_tokens, patches, self.drawn(patches), places)
        images = torch.arange(len(states), device=states.device)[:, None]
        return states[images, picked.to(states.device)]

    def _of_real(self, real: Tensor, places: range) -> tuple[Tensor, Tensor]:
        return drawn_of_real(real, self.prefix_tokens, self.drawn, 0, places)

    def weights_of_real(self, prefix_weight: float, real: Tensor, places: range) -> Tensor | None:
        """``weights`` of the drawn tokens of padded texts, in the order in which ``take`` has them.

        Each text's prefix tokens weigh as much less as fewer of its other tokens are drawn.
        """
        if self.prefix_tokens == 0 or (prefix_weight == 1.0 and self.share >= 1.0):
            return None
        texts, tokens = (index.cpu() for index in self._of_real(real, places))
        of_each = real[:, self.prefix_tokens :].sum(1).tolist()
        parts = [prefix_weight * (self.drawn(n) / n if n else 1.0) for n in of_each]
        own = torch.tensor(parts, dtype=torch.float64)[texts]
        return torch.where(tokens < self.prefix_tokens, own, torch.ones_like(own))

    def weights(self, prefix_weight: float, tokens: int) -> Tensor | None:
        """Weight of every drawn token of an image with so many; ``None`` where all weigh 1.

        Fewer patch tokens must not make the prefix tokens count for more.
        """
        patches = tokens - self.prefix_tokens
        drawn = self.drawn(patches)
        prefix = prefix_weight * drawn / patches if patches else prefix_weight
        if prefix == 1.0 or self.prefix_tokens == 0:
            return None
        parts = torch.full((self.prefix_tokens,), prefix), torch.ones(drawn)
        return torch.cat(parts).double()


@lru_cache(maxsize=1024)
def _positions(prefix_tokens: int, patches: int, drawn: int, places: range) -> Tensor:
    """Positions of the drawn tokens, the same for every block: (images, prefix + drawn)."""
    return drawn_tokens(prefix_tokens, patches, drawn, 0, places)


class RowSums:
    """The sums of one least-squares problem, of rows that come batch by batch.

    Args:
        inputs: width of x.
        outputs: width of y.
        dtype: of the products; float32 suffices where a ridge bounds the condition number.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        self._total = Regression.zeros(inputs, outputs)
        self._dtype = dtype
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add x (images, tokens, inputs) and y (images, tokens, outputs).

        ``weights`` are of the tokens of an image, shape (tokens,); all weigh 1 without them.
        """
        rows = None if weights is None else weights.repeat(len(x))
        self._waiting.append((x.flatten(0, 1), y.flatten(0, 1), rows))
        if sum(len(rows) for rows, _, _ in self._waiting) >= ROWS_AT_ONCE:
            self._multiply()

    def total(self) -> Regression:
        """The sums of all rows, over all processes of the run."""
        self._multiply()
        return self._total.over_ranks()

    def _multiply(self) -> None:
        if not self._waiting:
            return
        xs, ys, weighed = zip(*self._waiting, strict=True)
        weights = None
        if any(rows is not None for rows in weighed):
            parts = zip(xs, weighed, strict=True)
            weights = torch.cat(
                [torch.ones(len(x)).double() if rows is None else rows for x, rows in parts]
            )
        self._waiting.clear()
        self._total = self._total + Regression.of(
            torch.cat(xs), torch.cat(ys), self._dtype, weights
        )
