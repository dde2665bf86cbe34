"""Refit and repair: closed-form, on what the compressed prefix feeds, towards the original."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, one_thread  # noqa: F401
from sklearn.linear_model import LinearRegression, Ridge
from small import GatedBlock, PostNormBlock, SmallViT, small_blocks, small_vit
from solving import BARE, FIT, NEW, TWO, applied, kl, originals, regression, states, untouched
from torch import Tensor, nn

from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.models.blocks import find_chain
from blockfit.models.head import observe
from blockfit.search import tokens as rows
from blockfit.search.solve import Options, solve
from blockfit.search.states import TracedImages


@pytest.fixture
def every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs are solved from all tokens, as an independent solver is."""
    monkeypatch.setattr(rows, "ROWS_PER_INPUT", 10**9)


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
    blocks = find_chain(model)
    known = TracedImages.of(model, blocks, open_images(images[:28], batch_size=14))
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
    blocks = find_chain(model, fit)
    known = TracedImages.of(model, blocks, open_images(fit, batch_size=8))
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


def test_a_repair_meets_the_sum_that_a_norm_is_given(every_token: None) -> None:
    model = small_vit(block=PostNormBlock)
    options = Options(repair="mlp+attention", repair_ridge=1e-6)
    solution = solve(originals(model), Plan.of(["2:3"], "affine"), options)
    small = applied(model, small_blocks(model), solution)

    def given(vit: nn.Module, name: str) -> Tensor:
        seen: list[Tensor] = []
        layer = vit.blocks[3].get_submodule(name)
        with torch.no_grad(), layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            vit(FIT)
        return seen[0]

    for writer, norm in (("attention.out", "norm1"), ("mlp.narrow", "norm2")):
        read, found = given(small, writer), given(small, norm)
        with torch.no_grad():
            base = found - small.blocks[3].get_submodule(writer)(read)
            old = base + model.blocks[3].get_submodule(writer)(read)
        best = base + regression(read, given(model, norm) - base)
        assert (old - best).norm() > 0.05 * best.norm()
        torch.testing.assert_close(found, best, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("block", [PostNormBlock, GatedBlock])
def test_a_folded_span_needs_a_layer_that_adds_to_what_the_block_returns(
    block: type[nn.Module],
) -> None:
    known = originals(small_vit(block=block))
    with pytest.raises(
        BlockfitError, match=r"block 1 has no linear layer .* folded map of span 2:3"
    ):
        solve(known, Plan.of(["2:3"], "folded"))
    if block is PostNormBlock:
        return
    # Without any, repair has nothing to do, and the maps are solved all the same.
    solution = solve(known, Plan.of(["2:3"], "affine"), Options(repair="mlp+attention"))
    assert solution.weights == {}
    assert len(solution.maps) == 1
