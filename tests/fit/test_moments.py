"""Moments: the sums of any split of the images are the sums of one pass."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from families import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockfit.errors import BlockfitError
from blockfit.fit.moments import Moments, Regression
from blockfit.fit.plan import Span, spans_up_to

WIDTH, PREFIX, TOKENS, DEPTH, IMAGES = 4, 2, 5, 3, 12
SPANS = spans_up_to(DEPTH, 2)


def states(seed: int = 0, scale: float = 1.0) -> dict[int, Tensor]:
    """h[0] … h[L] of some images."""
    generator = torch.Generator().manual_seed(seed)
    return {
        boundary: scale * torch.randn(IMAGES, TOKENS, WIDTH, generator=generator) + boundary
        for boundary in range(DEPTH + 1)
    }


def part(hidden: dict[int, Tensor], images: list[int]) -> dict[int, Tensor]:
    return {boundary: state[images] for boundary, state in hidden.items()}


def taken(*batches: dict[int, Tensor], spans: list[Span] = SPANS) -> Moments:
    moments = Moments(spans, WIDTH, PREFIX)
    for batch in batches:
        moments.add(batch)
    return moments


def sums(moments: Moments, token_type: str = "all") -> list[Tensor]:
    """Everything that can be asked of the moments."""
    out = []
    for span in moments.spans:
        problem = moments.regression(span, token_type)
        out += [torch.tensor([problem.count, *moments.angle(span, token_type)]).double()]
        out += [problem.sum_x, problem.sum_y, problem.xx, problem.xy, problem.yy]
    return out


def assert_same(left: Moments, right: Moments) -> None:
    for token_type in ("prefix", "patch", "all"):
        one, two = (torch.cat([s.flatten() for s in sums(m, token_type)]) for m in (left, right))
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-10)


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, IMAGES), max_size=4).map(sorted),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_equals_one_pass(
    cuts: list[int], added: int, chance: random.Random
) -> None:
    hidden = states()
    bounds = [0, *cuts, IMAGES]
    parts = [list(range(a, b)) for a, b in pairwise(bounds) if b > a]
    chance.shuffle(parts)
    # Some parts are added to one run, the others are runs of their own.
    total = taken(*(part(hidden, p) for p in parts[:added]))
    for images in parts[added:]:
        total.merge(taken(part(hidden, images)))
    assert_same(total, taken(hidden))


@pytest.mark.parametrize("token_type", ["prefix", "patch", "all"])
def test_the_sums_are_those_of_the_stored_states(token_type: str) -> None:
    hidden = states()
    moments = taken(part(hidden, list(range(7))), part(hidden, list(range(7, IMAGES))))
    tokens = {"prefix": slice(0, PREFIX), "patch": slice(PREFIX, None), "all": slice(None)}
    for span in SPANS:
        x, y = (
            hidden[b][:, tokens[token_type]].reshape(-1, WIDTH).double().numpy()
            for b in (span.start, span.stop)
        )
        problem = moments.regression(span, token_type)
        assert problem.count == len(x)
        assert problem.xx.numpy() == pytest.approx(x.T @ x)
        assert problem.xy.numpy() == pytest.approx(x.T @ y)
        assert problem.sum_x.numpy() == pytest.approx(x.sum(0))
        assert problem.sum_y.numpy() == pytest.approx(y.sum(0))
        assert problem.yy.numpy() == pytest.approx((y * y).sum(0))
        second, first, count = moments.second_moment(span.stop, token_type)
        assert second.numpy() == pytest.approx(y.T @ y)
        assert (count, first.tolist()) == (len(y), pytest.approx(y.sum(0).tolist()))


def test_prefix_tokens_weigh_as_if_they_came_several_times() -> None:
    hidden = states()
    repeated = {b: torch.cat([h[:, :PREFIX]] * 3 + [h[:, PREFIX:]], 1) for b, h in hidden.items()}
    often = Moments(SPANS, WIDTH, 3 * PREFIX)
    often.add(repeated)
    for span in SPANS:
        weighted = taken(hidden).regression(span, prefix_weight=3.0)
        once = often.regression(span)
        assert weighted.count == once.count
        torch.testing.assert_close(weighted.xx, once.xx)
        torch.testing.assert_close(weighted.xy, once.xy)


def test_the_angle_is_that_between_the_tokens() -> None:
    """30°, 90° and 180° between h[0] and h[1]: means of cosine and angle / π."""
    angles = torch.tensor([30.0, 90.0, 180.0]).deg2rad()
    before = torch.tensor([[5.0, 0.0]]).expand(3, 2)
    after = 0.1 * torch.stack([angles.cos(), angles.sin()], 1)
    moments = Moments([Span(0, 1)], 2, 0)
    moments.add({0: before[None], 1: after[None]})
    cosine, angle = moments.angle(Span(0, 1))
    assert cosine == pytest.approx((3**0.5 / 2 + 0 - 1) / 3, abs=1e-6)
    assert angle == pytest.approx((1 / 6 + 1 / 2 + 1) / 3, abs=1e-4)


def test_memory_does_not_grow_with_images_tokens_or_spans_of_one_boundary() -> None:
    few, many = taken(states()), taken(*[states(seed) for seed in range(20)])
    assert few.nbytes() == many.nbytes()
    assert many.tokens == {"prefix": 20 * IMAGES * PREFIX, "patch": 20 * IMAGES * 3}
    # O(pairs · width²): float64 values of one pair, one more for every boundary, for both types.
    square = 8 * WIDTH * WIDTH
    assert few.nbytes() < 2 * (len(SPANS) + DEPTH + 1) * (square + 8 * (WIDTH + 2))


def test_half_precision_states_are_summed_in_float64() -> None:
    """float16 ends at 65504; sums of squares of large channels go far beyond it."""
    hidden = {b: (h * 200).half() for b, h in states().items()}
    problem = taken(hidden).regression(Span(0, 2))
    x = hidden[0].reshape(-1, WIDTH).double()
    torch.testing.assert_close(problem.xx, x.T @ x, rtol=1e-14, atol=0)
    assert problem.xx.diagonal().max() > 65504


def test_sums_can_be_scaled_and_added() -> None:
    x, y = torch.randn(9, 3), torch.randn(9, 2)
    both = Regression.of(x, y) * 2.0 + Regression.of(x, y)
    thrice = Regression.of(torch.cat([x] * 3), torch.cat([y] * 3))
    for name in ("count", "sum_x", "sum_y", "xx", "xy", "yy"):
        torch.testing.assert_close(
            torch.as_tensor(getattr(both, name)), torch.as_tensor(getattr(thrice, name))
        )


def test_what_was_not_summed_cannot_be_asked_for() -> None:
    moments = Moments([Span(0, 2)], WIDTH, 0)
    with pytest.raises(BlockfitError, match=r"holds no hidden state h\[2\]"):
        moments.add({0: torch.zeros(1, TOKENS, WIDTH)})
    with pytest.raises(BlockfitError, match="hold no tokens; add batches first"):
        moments.regression(Span(0, 2))
    moments.add({b: torch.zeros(1, TOKENS, WIDTH) for b in (0, 2)})
    with pytest.raises(BlockfitError, match="no moments were taken for span 1:2"):
        moments.regression(Span(1, 2))
    with pytest.raises(BlockfitError, match="no moments were taken for span 2:3"):
        moments.angle(Span(2, 3))
    with pytest.raises(BlockfitError, match="hold no prefix tokens"):
        moments.regression(Span(0, 2), "prefix")
    with pytest.raises(BlockfitError, match="unknown token type 'cls'"):
        moments.regression(Span(0, 2), "cls")
    with pytest.raises(BlockfitError, match="no span to take moments for"):
        Moments([], WIDTH, 0)


def test_moments_of_other_spans_are_not_merged() -> None:
    moments = Moments([Span(0, 2)], WIDTH, PREFIX)
    for other in (
        Moments([Span(0, 1)], WIDTH, PREFIX),
        Moments([Span(0, 2)], WIDTH + 1, PREFIX),
        Moments([Span(0, 2)], WIDTH, PREFIX + 1),
        Moments([Span(0, 2), Span(2, 3)], WIDTH, PREFIX),
    ):
        with pytest.raises(BlockfitError, match="cannot be added"):
            moments.merge(other)


@pytest.mark.parametrize("width", [256, 512, 700])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_square_of_a_wide_layer_is_the_whole_product(width: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(40, width, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(40, generator=generator, dtype=torch.float64) if weighted else None
    found = Regression.of(x, y, weights=weights).xx
    scaled = x if weights is None else x * weights[:, None]
    torch.testing.assert_close(found, scaled.T @ x)
    if width >= 512:
        assert torch.equal(found.triu(256), found.tril(-256).T)
