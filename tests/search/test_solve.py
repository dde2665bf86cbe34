"""Solving plans: what is shared, kept, computed again and checked on the way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, InPlaceBlock, PlainViT, one_thread  # noqa: F401
from small import (
    PostNormBlock,
    ScaledBlock,
    small_blocks,
    small_images,
    small_pictures,
    small_vit,
)
from solving import BARE, FIT, NEW, TWO, applied, originals, regression, states, untouched
from torch import nn

from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.fit.plan import PARTS, Narrowing, Plan, Replacement, Span
from blockfit.models.blocks import Blocks, find_chain
from blockfit.models.narrowed import narrowed
from blockfit.models.probe import Probe
from blockfit.models.surgery import swapped
from blockfit.progress import silent
from blockfit.search.prefixes import Beginnings
from blockfit.search.solve import Choices, Options, Solution, _Walk, solve
from blockfit.search.states import TracedImages


@pytest.mark.parametrize("plan", [TWO, Plan.of(["1:2", "3:5"], "folded")], ids=str)
def test_states_that_do_not_fit_into_memory_are_computed_again(plan: Plan) -> None:
    model = small_vit()
    roomy, tight = (solve(originals(model, limit_bytes=size), plan) for size in (2 << 30, 0))
    assert roomy.weights.keys() == tight.weights.keys()
    for name, value in roomy.weights.items():
        torch.testing.assert_close(tight.weights[name], value, rtol=1e-4, atol=1e-5)


def test_every_block_runs_its_attention_once_and_the_weights_are_those_of_whole_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_vit()
    known, ran = originals(model), []
    solve(known, TWO)  # finds out what the blocks are like, and what the original does in them
    handles = [
        block.attention.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
        for i, block in enumerate(model.blocks)
    ]
    quick = solve(known, TWO)
    batches = len(known.traces)
    assert {i: ran.count(i) for i in ran} == {2: batches, 4: batches, 5: batches}
    for handle in handles:
        handle.remove()
    monkeypatch.setattr(Probe, "skip", lambda self, index: None)
    slow = solve(known, TWO)
    for name, value in quick.weights.items():
        torch.testing.assert_close(value, slow.weights[name], rtol=1e-4, atol=1e-5)


def test_plans_that_begin_alike_are_refitted_from_where_they_part() -> None:
    model = small_vit()
    known, ran = originals(model), []
    options = Options(repair="none")
    plans = [
        Plan.of(["0:1", "2:3"], "affine"),
        Plan.of(["0:1", "2:3", "4:5"], "affine"),
        Plan.of(["0:1", "3:5"], "affine"),
        Plan.of(["0:1", "2:3"], "scale"),
    ]
    alone = [solve(known, plan, options) for plan in plans]
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    beginnings = Beginnings(plans)
    together = [solve(known, plan, options, beginnings=beginnings) for plan in plans]
    batches = len(known.traces)
    # Block 1 runs once for the first two plans, again for 0:1 and 3:5 with block 2, and for scales.
    assert {i: ran.count(i) for i in ran} == {1: 3 * batches, 2: batches, 3: batches}
    for one, other in zip(alone, together, strict=True):
        for left, right in zip(one.maps, other.maps, strict=True):
            for name, value in left.state_dict().items():
                assert torch.equal(value, right.state_dict()[name])


def test_folded_maps_and_repairs_share_no_beginnings() -> None:
    model = small_vit()
    known = originals(model)
    folded = [Plan.of(["1:2", last], "folded") for last in ("3:4", "4:5")]
    beginnings = Beginnings([*folded, *folded, TWO, TWO])
    for plan in folded:
        solve(known, plan, Options(repair="none"), beginnings=beginnings)
        assert beginnings.longest(plan) is None
    solve(known, TWO, Options(), beginnings=beginnings)
    assert beginnings.longest(TWO) is None


def test_a_part_of_the_originals_is_that_of_fewer_images() -> None:
    model = small_vit()
    part = originals(model).part(9)
    assert [len(t.states[0]) for t in part.traces] == [8, 8]
    plan = Plan.of(["2:4"], "affine")
    few = solve(originals(model, FIT[:16]), plan)
    for name, value in solve(part, plan).weights.items():
        torch.testing.assert_close(value, few.weights[name])


def test_blocks_that_write_into_their_input_are_solved_like_others() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tame = PlainViT().eval()
    wild = PlainViT(InPlaceBlock).eval()
    wild.load_state_dict(tame.state_dict())
    images = FAMILIES["plain"].images(12)
    plan = Plan.of(["1:2"], "affine")
    solutions = []
    for model in (tame, wild):
        known = TracedImages.of(model, find_chain(model), open_images(images, batch_size=6))
        before = [{b: s.clone() for b, s in t.states.items()} for t in known.traces]
        solutions.append(solve(known, plan))
        for seen, kept in zip(known.traces, before, strict=True):
            assert all(torch.equal(seen.states[b], kept[b]) for b in kept)
    for name, value in solutions[0].weights.items():
        torch.testing.assert_close(solutions[1].weights[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        solutions[1].maps[0].state_dict(), solutions[0].maps[0].state_dict(), rtol=1e-4, atol=1e-5
    )


def test_a_bfloat16_model_is_solved_too() -> None:
    model = small_vit().bfloat16()
    solution = solve(originals(model, FIT.bfloat16()), TWO)
    assert all(p.dtype == torch.float32 for m in solution.maps for p in m.parameters())
    small = applied(model, small_blocks_of(model), solution)
    assert small(NEW.bfloat16()).isfinite().all()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def small_blocks_of(model: nn.Module) -> Blocks:
    return find_chain(model, small_pictures(2).bfloat16())


def test_prefix_tokens_count_by_their_weight() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    before = states(model, blocks, FIT)
    plans = (Plan.of(["2:4"], "affine"), Plan.of(["2:4"], "folded"))
    for plan in plans:
        error = []
        for weight in (0.1, 1.0, 50.0):
            options = Options(ridge=0.0, repair="none", prefix_weight=weight)
            small = applied(model, blocks, solve(originals(model), plan, options))
            gap = states(small, blocks, FIT)[4] - before[4]
            error.append(float(gap[:, :1].square().sum()))
        assert error[0] > error[1] > error[2]


def test_nothing_to_remove_is_nothing_to_solve() -> None:
    model = small_vit()
    solution = solve(originals(model), Plan())
    assert (solution.maps, dict(solution.weights)) == ((), {})
    with pytest.raises(BlockfitError, match="span 5:7 leaves the model"):
        solve(originals(model), Plan.of(["5:7"], "affine"))


def test_a_solution_can_be_rounded_to_what_half_precision_holds() -> None:
    model = small_vit()
    solution = solve(originals(model), TWO)
    rounded = solution.rounded(torch.float16)
    pairs = [
        *zip(solution.maps[0].parameters(), rounded.maps[0].parameters(), strict=True),
        *((value, rounded.weights[name]) for name, value in solution.weights.items()),
    ]
    for exact, value in pairs:
        assert value.dtype == torch.float32
        assert torch.equal(value, exact.half().float())
    assert any(not torch.equal(exact, value) for exact, value in pairs)


def test_without_a_ridge_given_each_map_gets_the_one_that_errs_least_on_other_images() -> None:
    """16 tokens of noise per channel: the more, the nearer to the identity."""
    model = small_vit(residual=0.05)
    blocks = small_blocks(model)
    known = TracedImages.of(model, blocks, open_images(FIT[:2], batch_size=1))
    plan = Plan.of(["1:5"], "affine")
    after = {}
    for ridge in (0.0, None):
        small = applied(model, blocks, solve(known, plan, Options(ridge=ridge, repair="none")))
        after[ridge] = float((states(small, blocks, NEW)[5] - states(model, blocks, NEW)[5]).norm())
    assert after[None] < after[0.0]


def test_progress_counts_blocks() -> None:
    model = small_vit()
    steps: list[tuple[int, int]] = []
    solve(originals(model), TWO, progress=lambda *now: steps.append(now))
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_a_solution_that_does_not_fit_changes_nothing() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    good = solve(originals(model), TWO)
    check = untouched(model)
    wrong_name = Solution(good.plan, good.maps, {"blocks.9.mlp.narrow.weight": torch.zeros(1)})
    wrong_shape = Solution(good.plan, good.maps, {"blocks.2.mlp.narrow.weight": torch.zeros(1)})
    for solution in (wrong_name, wrong_shape):
        with pytest.raises(
            BlockfitError, match=r"has no parameter 'blocks\..\.mlp\.narrow\.weight'"
        ):
            solution.apply(model, blocks)
    with pytest.raises(BlockfitError, match="2 spans, but 1 maps"):
        Solution(good.plan, good.maps[:1], good.weights).apply(model, blocks)
    check()


def half(parts: Sequence[Mapping[str, Narrowing]]) -> Plan:
    """Half of every part of some blocks."""
    return Plan((), tuple(replace(p, kept=p.size // 2) for some in parts for p in some.values()))


def narrowed_solution(model: nn.Module) -> Solution:
    """Every part of blocks 1 and 3 at half of its size."""
    known = originals(model)
    parts = [known.probe.parts(index).whole for index in (1, 3)]
    return solve(known, half(parts))


@pytest.mark.parametrize("own", [True, False])
def test_a_solution_is_built_into_a_copy_and_what_goes_is_not_copied_first(own: bool) -> None:
    model = small_vit()
    blocks = small_blocks(model)
    solution = narrowed_solution(model)
    expected = copy.deepcopy(model)
    solution.apply(expected, blocks)
    check = untouched(model)
    small = solution.built(model, blocks, own)
    found, wanted = small.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert (not shared) == own
    assert not {v.data_ptr() for v in solution.weights.values()} & {
        p.data_ptr() for p in small.parameters()
    }
    check()
    if own:
        with torch.no_grad():
            for value in small.parameters():
                value.zero_()
        check()


def test_a_trial_reads_the_solved_weights_where_they_lie() -> None:
    """Layers of a model's own size are not copied out for what other values stand in for."""
    model = small_vit()
    blocks = small_blocks(model)
    solution = narrowed_solution(model)
    check, whole = untouched(model), {n: p.numel() for n, p in model.named_parameters()}
    with narrowed(model, blocks, solution.plan.narrowings, solution.weights):
        known = dict(model.named_parameters())
        narrower = [n for n, v in solution.weights.items() if v.numel() < whole[n]]
        assert len(narrower) >= 8  # two layers of each MLP, two of each attention
        for name in narrower:
            assert known[name].data_ptr() == solution.weights[name].data_ptr()
    check()


def test_swapped_weights_come_back_whatever_happens() -> None:
    model = small_vit()
    check = untouched(model)
    with swapped(model, {"head.bias": torch.ones(4)}):
        assert (model.head.bias == 1).all()
    check()
    with pytest.raises(RuntimeError, match="stop"), swapped(model, {"head.bias": torch.ones(4)}):
        raise RuntimeError("stop")
    check()
    with (
        pytest.raises(AttributeError),
        swapped(model, {"head.bias": torch.ones(4), "none": torch.ones(1)}),
    ):
        pass
    check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": "all"}, "unknown repair 'all'; choose one of none, mlp, mlp.attention"),
        ({"ridge": -1.0}, "ridge must be 0 or more, got -1"),
        ({"ridge": float("nan")}, "ridge must be 0 or more, got nan"),
        ({"repair_ridge": float("inf")}, "repair_ridge must be 0 or more, got inf"),
        ({"prefix_weight": 0.0}, "prefix_weight must be above 0, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BlockfitError, match=message):
        Options(**options)


def test_maps_per_token_type_are_refitted_per_token_type() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    plan = Plan(
        (Replacement(Span(1, 2), "affine"), Replacement(Span(3, 4), "scale", per_token_type=True))
    )
    small = applied(model, blocks, solve(originals(model), plan, BARE))
    before, after = states(model, blocks, FIT), states(small, blocks, FIT)
    for tokens in (slice(0, 1), slice(1, None)):
        for channel in range(3):
            x = after[3][:, tokens, channel : channel + 1]
            expected = regression(x, before[4][:, tokens, channel : channel + 1])
            got = after[4][:, tokens, channel : channel + 1]
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_there_must_be_images_to_fit_on() -> None:
    model = small_vit()
    with pytest.raises(BlockfitError, match="there are no images to fit on"):
        TracedImages.of(model, small_blocks(model), small_images(4).take(0))


@pytest.mark.parametrize(("kind", "rounding"), [(ScaledBlock, 1e-5), (PostNormBlock, 5e-4)])
def test_what_stays_of_narrowed_parts_is_taken_over_by_a_second_solution(
    kind: type[nn.Module], rounding: float
) -> None:
    """On the same images the second one is the first; on more, it keeps the same neurons."""
    model = small_vit(block=kind)
    known, more = originals(model), originals(model, images=small_pictures(40, seed=7))
    parts = [known.probe.parts(index).whole for index in (1, 3)]
    plan = half(parts)
    assert {cut.part for cut in plan.narrowings} == set(PARTS)
    choices = Choices()
    first = solve(known, plan, choices=choices)
    again, other = (solve(some, plan, choices=choices) for some in (known, more))
    for name, value in first.weights.items():
        torch.testing.assert_close(again.weights[name], value, rtol=1e-4, atol=rounding)
        assert other.weights[name].shape == value.shape
    mlps = [cut for cut in plan.narrowings if cut.part == "mlp"]
    rows = [f"blocks.{cut.block}.{rows.layer}.weight" for cut in mlps for rows in cut.rows]
    assert all(torch.equal(first.weights[name], other.weights[name]) for name in rows)
    assert any(not torch.equal(value, other.weights[name]) for name, value in first.weights.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", [ScaledBlock, PostNormBlock])
def test_the_states_of_a_walk_are_those_of_the_solved_model(kind: type[nn.Module]) -> None:
    model = small_vit(block=kind)
    blocks, known, choices = small_blocks(model), originals(model), Choices()
    parts = [known.probe.parts(index).whole for index in (1, 3)]
    plan = Plan((), tuple(replace(p, kept=p.size // 2) for some in parts for p in some.values()))
    plan = replace(plan, replacements=(Replacement(Span(2, 3), "affine"),))
    for _ in range(2):  # the second walk takes over what stays
        walk = _Walk(known, plan, Options(), choices=choices)
        small = applied(model, blocks, walk.solution(silent))
        assert walk.hidden is not None
        last = states(small, blocks, FIT)[blocks.depth]
        torch.testing.assert_close(torch.cat(walk.hidden), last, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(last, states(model, blocks, FIT)[blocks.depth], atol=1e-2)
