"""Drawn tokens and the sums over them."""

from __future__ import annotations

import pytest
import torch

from blockfit.fit.moments import Regression
from blockfit.search import tokens as rows
from blockfit.search.tokens import Draw, RowSums


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_draw_keeps_prefix_tokens_and_as_many_patches_as_the_layer_asks_for() -> None:
    # 6 rows per input of 32 inputs over 8 images: 24 of each image's 101 tokens.
    assert Draw.limited(1, 8 * 101, inputs=32).drawn(100) == 24
    assert Draw.limited(1, 2 * 101, inputs=64).drawn(100) == 100  # few images: all
    assert Draw.limited(1, 10**6 * 101, inputs=32).drawn(100) == 1  # never none
    assert Draw.limited(3, 10**6 * 3, inputs=32).drawn(0) == 0  # no patches at all


def test_images_of_every_size_are_drawn_from_their_own_grid() -> None:
    """Case 15: a quarter of 20 patches and a quarter of 8, each of the image's own positions."""
    draw = Draw(2, 0.25)
    for patches, drawn in ((20, 5), (8, 2), (40, 10)):
        taken = draw.take(random(3, 2 + patches, 4), range(3))
        assert taken.shape == (3, 2 + drawn, 4)
        weights = draw.weights(1.0, 2 + patches)
        assert weights is not None
        assert weights.tolist() == [0.25, 0.25, *[1] * drawn]
    whole = torch.arange(42.0).view(1, 42, 1).expand(50, -1, -1)
    assert draw.take(whole, range(50)).max() > 30  # late positions of a large grid, too


def test_what_is_drawn_hangs_on_the_images_place_not_on_its_batch() -> None:
    draw, states = Draw(2, 0.25), random(6, 22, 4)
    whole = draw.take(states, range(10, 16))
    assert whole.shape == (6, 7, 4)
    assert torch.equal(whole[:, :2], states[:, :2])
    assert torch.equal(draw.take(states[3:], range(13, 16)), whole[3:])
    assert not torch.equal(draw.take(states, range(6)), whole)
    for image, taken in zip(states, whole, strict=True):
        found = (taken[2:, None] == image[None, 2:]).all(-1)
        assert found.sum(1).tolist() == [1] * 5  # each a patch of the same image
        assert found.sum(0).max() == 1  # none twice
    assert Draw(2).take(states, range(6)) is states


def test_prefix_tokens_keep_their_share_of_the_weight_when_patches_are_drawn() -> None:
    weights = Draw(2, 0.25).weights(1.0, 22)
    assert weights is not None
    assert weights.tolist() == [0.25, 0.25, 1, 1, 1, 1, 1]
    assert weights[:2].sum() / weights.sum() == pytest.approx(2 / 22)
    assert Draw(2).weights(1.0, 22) is None
    assert Draw(0, 0.25).weights(7.0, 20) is None
    heavy = Draw(2).weights(3.0, 4)
    assert heavy is not None
    assert heavy.tolist() == [3, 3, 1, 1]


@pytest.mark.parametrize("at_once", [1, 13, 10**6])
def test_sums_of_batches_are_those_of_weighted_rows(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", at_once)
    x, y = random(6, 4, 3), random(6, 4, 2, seed=1)
    sums, weights = RowSums(3, 2, torch.float64), torch.tensor([3.0, 1, 1, 1])
    for some in (slice(0, 2), slice(2, 3), slice(3, 6)):
        sums.add(x[some], y[some], weights)
    # A weight of 3 is a row that occurs three times.
    times = torch.tensor([3, 1, 1, 1]).repeat(6)
    expected = Regression.of(
        x.reshape(-1, 3).repeat_interleave(times, 0), y.reshape(-1, 2).repeat_interleave(times, 0)
    )
    total = sums.total()
    assert total.count == expected.count == 36
    for name in ("sum_x", "sum_y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(total, name), getattr(expected, name))
