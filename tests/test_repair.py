"""Refit and repair: closed-form, on what the compressed prefix feeds, towards the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, InPlaceBlock, PlainViT, one_thread  # noqa: F401
from sklearn.linear_model import LinearRegression, Ridge
from small import PostNormBlock, SmallViT, small_blocks, small_images, small_pictures, small_vit
from torch import Tensor, nn

from blockfit import rows
from blockfit.beginnings import Beginnings
from blockfit.blocks import Blocks, find_blocks, record
from blockfit.data import images as open_images
from blockfit.errors import BlockfitError
from blockfit.head import observe
from blockfit.originals import Originals
from blockfit.repair import Options, Solution, solve
from blockfit.spans import Plan, Replacement, Span
from blockfit.surgery import swapped

FIT, NEW = small_pictures(24), small_pictures(64, seed=1)
BARE = Options(ridge=0.0, repair="none")
TWO = Plan.of(["1:2", "3:4"], "affine")


@pytest.fixture
def every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs are solved from all tokens, as an independent solver is."""
    monkeypatch.setattr(rows, "ROWS_PER_INPUT", 10**9)


@torch.no_grad()
def states(model: nn.Module, blocks: Blocks, images: Tensor) -> list[Tensor]:
    with record(model, blocks) as seen:
        model(images)
    return seen


def applied(model: nn.Module, blocks: Blocks, solution: Solution) -> Any:
    small = copy.deepcopy(model)
    solution.apply(small, blocks)
    return small


def originals(model: nn.Module, images: Tensor = FIT, **options: Any) -> Originals:
    return Originals(model, small_blocks(model), open_images(images, batch_size=8), **options)


def regression(x: Tensor, y: Tensor) -> Tensor:
    """Fitted values of scikit-learn's least squares with a bias, on all tokens of all images."""
    rows, targets = (t.flatten(0, 1).double().numpy() for t in (x, y))
    fitted = LinearRegression().fit(rows, targets).predict(rows)
    return torch.as_tensor(fitted).reshape(y.shape).float()


def kl(model: nn.Module, small: nn.Module, images: Tensor = NEW) -> float:
    with torch.no_grad():
        p, q = (m(images).double().log_softmax(1) for m in (model, small))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("refit", [False, True])
def test_a_map_is_fitted_on_all_tokens_of_all_images(refit: bool) -> None:
    model = small_vit()
    blocks = small_blocks(model)
    options = Options(ridge=0.0, repair="none", refit=refit)
    small = applied(model, blocks, solve(originals(model), Plan.of(["2:4"], "affine"), options))
    before, after = states(model, blocks, FIT), states(small, blocks, FIT)
    torch.testing.assert_close(after[4], regression(before[2], before[4]), rtol=1e-3, atol=1e-4)


def test_the_second_map_is_refitted_on_what_the_first_leaves() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    small = applied(model, blocks, solve(originals(model), TWO, BARE))
    before, after = states(model, blocks, FIT), states(small, blocks, FIT)
    assert (after[3] - before[3]).norm() > 1e-2 * before[3].norm()
    torch.testing.assert_close(after[4], regression(after[3], before[4]), rtol=1e-3, atol=1e-4)


def test_refit_lowers_error_when_two_spans_follow_each_other() -> None:
    losses = {False: 0.0, True: 0.0}
    for seed in range(3):
        model = small_vit(seed=seed)
        blocks = small_blocks(model)
        error = {}
        for refit in losses:
            options = Options(repair="none", refit=refit)
            small = applied(model, blocks, solve(originals(model), TWO, options))
            before, after = states(model, blocks, NEW), states(small, blocks, NEW)
            error[refit] = float((after[4] - before[4]).square().mean())
            losses[refit] += kl(model, small)
        assert error[True] < error[False]
    assert losses[True] < losses[False]


def mlp_parts(model: SmallViT, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The state before the MLP's contribution, and what its second layer is given."""
    block = model.blocks[index]
    middle = hidden + block.gamma1 * block.attention(block.norm1(hidden))
    return middle, torch.relu(block.mlp.wide(block.norm2(middle)))


@torch.no_grad()
@pytest.mark.usefixtures("every_token")
def test_the_mlp_repair_is_least_squares_towards_the_originals_states() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    options = Options(ridge=0.0, repair="mlp", repair_ridge=0.0)
    small = applied(model, blocks, solve(originals(model), Plan.of(["1:3"], "affine"), options))
    before, after = states(model, blocks, FIT), states(small, blocks, FIT)
    for index in (3, 4, 5):
        middle, read = mlp_parts(small, index, after[index])
        expected = middle + regression(read, before[index + 1] - middle)
        torch.testing.assert_close(after[index + 1], expected, rtol=1e-2, atol=2e-4)


def ridge_towards(old: Tensor, gamma: Tensor, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """W that minimises ‖y − γ ∘ (W x + b)‖² with scikit-learn's ridge on the change of γ ∘ W.

    Each input is brought to unit standard deviation, and the bias is free.
    """
    rows = x.flatten(0, 1).double()
    missing = y.flatten(0, 1).double() - rows @ (gamma[:, None] * old).double().T
    size = rows.std(0, correction=0)
    alive = size > 0
    known = Ridge(alpha=ridge * len(rows), solver="svd").fit((rows / size)[:, alive], missing)
    change = torch.zeros_like(old)
    change[:, alive] = (torch.as_tensor(known.coef_) / size[alive]).float()
    return old + change / gamma[:, None]


@torch.no_grad()
@pytest.mark.usefixtures("every_token")
@pytest.mark.parametrize("ridge", [0.01, 0.5])
def test_repairs_are_ridge_regressions_towards_the_original_weights(ridge: float) -> None:
    """First the attention's, towards the state before the MLP; then the MLP's; with LayerScale."""
    model = small_vit()
    blocks = small_blocks(model)
    options = Options(ridge=0.0, repair="mlp+attention", repair_ridge=ridge)
    small = applied(model, blocks, solve(originals(model), Plan.of(["1:3"], "affine"), options))
    before, after = states(model, blocks, FIT), states(small, blocks, FIT)
    old, new = model.blocks[3], small.blocks[3]
    heard: list[Tensor] = []
    handle = new.attention.out.register_forward_pre_hook(lambda m, args: heard.append(args[0]))
    middle, read = mlp_parts(small, 3, after[3])
    handle.remove()

    target = mlp_parts(model, 3, before[3])[0] - after[3]
    expected = ridge_towards(old.attention.out.weight, old.gamma1, heard[0], target, ridge)
    torch.testing.assert_close(new.attention.out.weight, expected, rtol=1e-2, atol=1e-3)

    expected = ridge_towards(old.mlp.narrow.weight, old.gamma2, read, before[4] - middle, ridge)
    torch.testing.assert_close(new.mlp.narrow.weight, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("how", ["mlp", "mlp+attention"])
@pytest.mark.parametrize("kind", ["identity", "affine", "folded"])
def test_repair_lowers_the_held_out_kl_and_adds_no_parameters(kind: str, how: str) -> None:
    plan = Plan.of(["1:2", "3:4"], kind)
    losses = {"none": 0.0, how: 0.0}
    for seed in range(3):
        model = small_vit(seed=seed)
        blocks = small_blocks(model)
        sizes = set()
        for name in losses:
            small = applied(model, blocks, solve(originals(model), plan, Options(repair=name)))
            losses[name] += kl(model, small)
            sizes.add(sum(p.numel() for p in small.parameters()))
        assert len(sizes) == 1
    assert losses[how] < losses["none"]


def test_only_output_weights_of_kept_blocks_behind_the_first_span_are_repaired() -> None:
    model = small_vit()
    plan = Plan.of(["2:3", "4:5"], "affine")
    outputs = ("attention.out", "mlp.narrow")
    for how, layers in (("none", ()), ("mlp", outputs[1:]), ("mlp+attention", outputs)):
        solution = solve(originals(model), plan, Options(repair=how))
        assert set(solution.weights) == {
            f"blocks.{block}.{layer}.{part}"
            for block in (3, 5)
            for layer in layers
            for part in ("weight", "bias")
        }
        known = dict(model.named_parameters())
        assert all(value.shape == known[n].shape for n, value in solution.weights.items())


@pytest.mark.parametrize("how", ["mlp", "mlp+attention"])
def test_an_endless_ridge_leaves_the_original_weights(how: str) -> None:
    model = small_vit()
    options = Options(repair=how, repair_ridge=1e9)
    solution = solve(originals(model), Plan.of(["1:2"], "affine"), options)
    known = dict(model.named_parameters())
    for name, value in solution.weights.items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, known[name].detach(), rtol=1e-4, atol=1e-4)


def untouched(model: nn.Module) -> Callable[[], None]:
    """Remember a model; the result asserts that nothing of it has changed since."""
    weights = copy.deepcopy(model.state_dict())
    objects = [id(p) for p in model.parameters()], [id(m) for m in model.modules()]
    modes = [m.training for m in model.modules()]

    def check() -> None:
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert ([id(p) for p in model.parameters()], [id(m) for m in model.modules()]) == objects
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())

    return check


@pytest.mark.parametrize("kind", ["affine", "folded"])
def test_solving_leaves_the_model_untouched(kind: str) -> None:
    model = small_vit().train()
    check = untouched(model)
    solve(originals(model), Plan.of(["1:2", "3:5"], kind), Options(repair="mlp+attention"))
    check()


@pytest.mark.parametrize("name", ["timm-dinov2", "dinov2-classifier", "torchvision-vit", "plain"])
def test_repair_brings_the_final_features_of_every_library_nearer(name: str) -> None:
    """The first two with LayerScale; the others with fused attention, so only MLPs are repaired."""
    family = FAMILIES[name]
    model = family.build()
    images = family.images(40)
    blocks = find_blocks(model)
    known = Originals(model, blocks, open_images(images[:28], batch_size=14))
    check = untouched(model)
    error = {}
    for how in ("none", "mlp", "mlp+attention"):
        plan = Plan.of(["1:2"], "affine")
        small = applied(model, blocks, solve(known, plan, Options(repair=how, ridge=1e-2)))
        before, after = (observe(m, blocks, images[28:]).features for m in (model, small))
        error[how] = float((after - before).norm() / before.norm())
    check()
    assert error["mlp"] < error["none"]
    assert error["mlp+attention"] < error["none"]
    if name in ("torchvision-vit", "plain"):
        assert error["mlp+attention"] == error["mlp"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "timm-dinov2", "dinov2-classifier", "timm-vit"])
def test_a_folded_map_is_the_map_of_the_mlps_contribution(name: str) -> None:
    """r + A m + b, with m the contribution of the MLP before the span, fitted by scikit-learn."""
    family = FAMILIES.get(name)
    model = small_vit() if family is None else family.build()
    fit, new = (FIT, NEW) if family is None else (family.images(32), family.images(5, seed=1))
    blocks = find_blocks(model, fit)
    known = Originals(model, blocks, open_images(fit, batch_size=8))
    plan = Plan.of(["2:4"], "folded")
    small = applied(model, blocks, solve(known, plan, Options(ridge=0.0, repair="none")))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())

    # The block before the span with its MLP's second layer silenced gives r; the rest is m.
    quiet = copy.deepcopy(model)
    layer = {"small": "mlp.narrow"}.get(name, "mlp.fc2")
    linear = quiet.get_submodule(f"{blocks.path}.1.{layer}")
    for parameter in linear.parameters():
        parameter.zero_()

    def parts(images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        whole, base = states(model, blocks, images), states(quiet, blocks, images)[2]
        return base, whole[2] - base, whole

    base, contribution, whole = parts(fit)
    rows = contribution.flatten(0, 1).double().numpy()
    mapping = LinearRegression().fit(rows, (whole[4] - base).flatten(0, 1).double().numpy())
    base, contribution, _ = parts(new)
    mapped = mapping.predict(contribution.flatten(0, 1).double().numpy())
    expected = base + torch.as_tensor(mapped).float().reshape(base.shape)
    for boundary in (2, 3, 4):
        got = states(small, blocks, new)[boundary]
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * float(base.std()))


def test_a_folded_span_needs_a_layer_that_simply_adds() -> None:
    model = small_vit(block=PostNormBlock)
    known = originals(model)
    with pytest.raises(
        BlockfitError, match=r"block 1 has no linear layer .* folded map of span 2:3"
    ):
        solve(known, Plan.of(["2:3"], "folded"))
    # Without one, repair has nothing to do, and the maps are solved all the same.
    solution = solve(known, Plan.of(["2:3"], "affine"), Options(repair="mlp+attention"))
    assert solution.weights == {}
    assert len(solution.maps) == 1


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
    monkeypatch.setattr(Originals, "skip", lambda self, index: None)
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
        known = Originals(model, find_blocks(model), open_images(images, batch_size=6))
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
    return find_blocks(model, small_pictures(2).bfloat16())


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
    known = Originals(model, blocks, open_images(FIT[:2], batch_size=1))
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
        pytest.raises(KeyError),
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
        Originals(model, small_blocks(model), small_images(4).take(0))
