"""Properties that hold for any data: sums in any split and order, fits at any scale."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WIDTH as SMALL_WIDTH
from small import small_blocks, small_pictures, small_vit
from torch import Tensor

import blockfit
from blockfit.errors import BlockfitError
from blockfit.fit.closed_form import fit_affine, fit_map
from blockfit.fit.moments import Moments, Regression
from blockfit.fit.numerics import full_float32
from blockfit.fit.plan import Plan, Replacement, Span, runs_of, spans_up_to
from blockfit.search.calibrate import calibrate

ROWS, WIDTH = 120, 8


@st.composite
def states(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """x and y (rows, width) in float64: any scale, constant, dead, equal and outlier channels."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    for channel in range(WIDTH):
        match draw(st.sampled_from(("as it is", "outlier", "shifted", "constant", "dead", "twin"))):
            case "outlier":
                x[:, channel] *= 1e4
            case "shifted":
                x[:, channel] += 1e3
            case "constant":
                x[:, channel] = 3.7
            case "dead":
                x[:, channel] = 0.0
            case "twin":
                x[:, channel] = x[:, (channel + 1) % WIDTH]
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    y = y + (x / x.abs().mean(0).clamp_min(1e-3)) @ mixing / WIDTH + 0.1 * noise
    scale = 10.0 ** draw(st.integers(-30, 30))
    return x * scale, y * scale


def _best(x: Tensor, y: Tensor, bias: bool) -> Tensor:
    """Fitted values of least squares by SVD, each column of unit length."""
    columns = torch.cat([x, torch.full((ROWS, 1), float(x.abs().max()))], 1) if bias else x
    size = columns.norm(dim=0)
    columns = columns / torch.where(size > 0, size, torch.ones_like(size))
    return columns @ torch.linalg.lstsq(columns, y, rcond=1e-10, driver="gelsd").solution


@given(states(), st.booleans())
def test_no_plain_fit_is_worse_than_lstsq_by_more_than_rounding(
    data: tuple[Tensor, Tensor], bias: bool
) -> None:
    """Compared by what is left, per channel: with equal columns the solutions may differ."""
    x, y = data
    fitted = fit_affine(Regression.of(x, y), 0.0, bias=bias)
    assert fitted.weight.isfinite().all()
    assert fitted.bias.isfinite().all()
    left = (x @ fitted.weight.T + fitted.bias - y).square().mean(0)
    least = (_best(x, y, bias) - y).square().mean(0)
    size = (y - x).square().mean(0) + 1e-9 * y.square().mean(0)
    assert bool(((left - least) / size < 1e-3).all()), ((left - least) / size).max()


@given(states(), st.sampled_from([1e-6, 1e-4, 1e-2]))
@settings(max_examples=30)
def test_a_fit_does_not_depend_on_the_unit_of_the_states(
    data: tuple[Tensor, Tensor], ridge: float
) -> None:
    x, y = data
    power = 2.0**20  # exact in floating point
    one, other = (fit_affine(Regression.of(x * s, y * s), ridge) for s in (1.0, power))
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.bias * power, other.bias, rtol=1e-9, atol=0)


@given(states())
@settings(max_examples=30)
def test_no_ridge_leaves_more_than_dropping_the_span(data: tuple[Tensor, Tensor]) -> None:
    """With a bias, every ridge is at least as good on its own data as the best shift of x."""
    x, y = data
    problem = Regression.of(x, y)
    gap = y - x
    shifted = float((gap - gap.mean(0)).square().sum(1).mean())
    for ridge in (1e-6, 1e-2, 1.0, 100.0):
        fitted = fit_affine(problem, ridge)
        left = (x @ fitted.weight.T + fitted.bias - y).square().sum(1).mean()
        assert float(left) <= shifted * (1 + 1e-6) + 1e-9 * float(y.square().sum(1).mean())


@given(states(), st.randoms(use_true_random=False), st.integers(1, 6))
@settings(max_examples=30)
def test_moments_split_and_merged_in_any_order_are_those_of_one_pass(
    data: tuple[Tensor, Tensor], chance: random.Random, parts: int
) -> None:
    hidden = {0: data[0].reshape(12, 10, WIDTH), 2: data[1].reshape(12, 10, WIDTH)}
    whole = Moments([Span(0, 2)], WIDTH, 1)
    whole.add(hidden)
    order = list(range(12))
    chance.shuffle(order)
    shares = [order[i::parts] for i in range(parts)]
    runs = []
    for share in shares:
        run = Moments([Span(0, 2)], WIDTH, 1)
        for image in share:  # one image at a time
            run.add({b: h[[image]] for b, h in hidden.items()})
        runs.append(run)
    while len(runs) > 1:  # merged pairwise in a random tree
        right = runs.pop(chance.randrange(len(runs)))
        runs[chance.randrange(len(runs))].merge(right)
    for token_type in ("prefix", "patch", "all"):
        one, two = (m.regression(Span(0, 2), token_type) for m in (whole, runs[0]))
        assert one.count == two.count
        for name in ("sum_x", "sum_y", "xx", "xy", "yy"):
            expected, got = getattr(one, name), getattr(two, name)
            size = expected.abs().max()
            assert bool(((expected - got).abs() <= 1e-12 * size).all()), name


@given(st.integers(1, 30), st.data())
def test_runs_of_blocks_remove_exactly_these_and_touch_nowhere(depth: int, data: Any) -> None:
    removed = data.draw(st.sets(st.integers(0, depth - 1)))
    spans = runs_of(removed)
    assert {block for span in spans for block in span.blocks} == removed
    assert all(a.stop < b.start for a, b in pairwise(spans))
    plan = Plan.of(spans, "affine")
    assert set(plan.removed_blocks) == removed
    if len(removed) == depth:
        with pytest.raises(BlockfitError, match="keep at least one"):
            plan.check(depth)
    else:
        plan.check(depth)


@given(st.integers(1, 16), st.integers(1, 16), st.data())
def test_every_span_up_to_a_length_is_named_once(depth: int, longest: int, data: Any) -> None:
    protected = data.draw(st.sets(st.integers(0, depth - 1)))
    found = spans_up_to(depth, longest, protected)
    assert found == sorted(set(found))
    assert len(spans_up_to(depth, longest)) == sum(
        depth - length + 1 for length in range(1, min(longest, depth) + 1)
    )
    assert all(len(span) <= longest and protected.isdisjoint(span.blocks) for span in found)


# -- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_calibrated_with_full_sums(dtype: torch.dtype) -> None:
    """The moments are those of the model's own half-precision states, summed in float64."""
    model = small_vit(4).to(dtype)
    pictures = small_pictures(12).to(dtype)
    blocks = small_blocks(small_vit(4))
    images = blockfit.images(pictures, batch_size=5)
    moments = calibrate(model, blocks, images, [Span(1, 3)])
    seen = []
    for index in (1, 3):
        model.blocks[index].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in images:
            model(batch)
    x, y = (torch.cat(seen[i::2]).double().reshape(-1, SMALL_WIDTH) for i in (0, 1))
    problem = moments.regression(Span(1, 3))
    torch.testing.assert_close(problem.xx, x.T @ x, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(problem.xy, x.T @ y, rtol=1e-12, atol=1e-9)
    module = fit_map(Replacement(Span(1, 3), "affine"), moments)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_float32_sums_keep_all_bits_whatever_the_user_has_set() -> None:
    x = torch.randn(50, 8)
    before = torch.get_float32_matmul_precision()
    plain = Regression.of(x, x, torch.float32)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(Regression.of(x, x, torch.float32).xx, plain.xx)
            with full_float32(x.device):
                assert torch.get_float32_matmul_precision() == "highest"
                assert (x @ x.T).dtype == torch.float32
            assert (x @ x.T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), full_float32(x.device):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def plans() -> dict[int, blockfit.Result]:
    """One compression for each batch size: 160 fit images, more than the quick refits take."""
    found = {}
    for size in (7, 32, 200):
        images = blockfit.images(small_pictures(176), batch_size=size)
        found[size] = blockfit.compress(small_vit(4), images, remove=1, hold_out=0.09)
    return found


def test_the_plan_and_the_weights_do_not_depend_on_the_batch_size(
    plans: dict[int, blockfit.Result],
) -> None:
    one = plans[32]
    for size, other in plans.items():
        assert other.plan == one.plan, size
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(
                other.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=f"{name}, {size}"
            )
