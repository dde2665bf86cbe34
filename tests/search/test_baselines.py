"""Baselines on a small model: what goes, what makes up for it, and how large the result is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command as run
from families import FAMILIES, one_thread  # noqa: F401
from small import GatedBlock, small_images, small_vit
from solving import FIT, applied, kl, originals, untouched
from torch import Tensor, nn

import blockfit
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.fit.published import BASELINES
from blockfit.search.baselines import Baseline, Neurons
from blockfit.search.budget import Budget, Sizes
from blockfit.search.reach import reach
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting
from blockfit.search.states import TracedImages

SHARE = 0.8


@pytest.fixture(scope="module")
def known() -> TracedImages:
    return originals(small_vit(residual=1.0))


@pytest.fixture(scope="module")
def sizes(known: TracedImages) -> Sizes:
    return Sizes(known.model, known.blocks, FIT)


def neurons_of(model: nn.Module, index: int) -> Tensor:
    """All tokens' neurons of one block on the images that are fitted on, shape (rows, 32)."""
    block = model.blocks[index]
    seen = []
    handle = block.mlp.narrow.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(FIT)
    handle.remove()
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("method", BASELINES)
def test_every_mlp_keeps_as_many_neurons_as_the_budget_allows(
    known: TracedImages, sizes: Sizes, method: str
) -> None:
    baseline = Baseline(Neurons(known), method)
    for kind in ("params", "flops"):
        plan = baseline.plan(sizes, kind, SHARE)
        (kept,) = {cut.kept for cut in plan.narrowings}
        assert [cut.block for cut in plan.narrowings] == list(range(6))
        more = Plan((), tuple(_keeping(cut, kept + 1) for cut in plan.narrowings))
        assert sizes.fraction(plan, kind) <= SHARE < sizes.fraction(more, kind)
    small = applied(known.model, known.blocks, baseline.solution(plan))
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters == sizes.of(plan)[0]
    assert torch.isfinite(small(FIT)).all()


def _keeping(cut: Any, kept: int) -> Any:
    return type(cut)(**{**vars(cut), "kept": kept})


def test_corp_keeps_the_neurons_of_most_energy_and_activity_and_folds_the_others(
    known: TracedImages, sizes: Sizes
) -> None:
    baseline = Baseline(Neurons(known), "corp")
    plan = baseline.plan(sizes, "params", SHARE)
    solution = baseline.solution(plan)
    block = known.model.blocks[2]
    x, kept = neurons_of(known.model, 2), plan.narrowings[2].kept
    active = x.abs() > 0.01 * x.square().mean().sqrt()
    scores = x.square().mean(0) * active.double().mean(0)
    stays = sorted(scores.topk(kept).indices.tolist())
    torch.testing.assert_close(
        solution.weights["blocks.2.mlp.wide.weight"], block.mlp.wide.weight.detach()[stays]
    )
    # What is written then: the best affine function of the kept neurons, but for the ridge.
    design = torch.cat([x[:, stays], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    whole = x @ block.mlp.narrow.weight.detach().double().T
    best = design @ torch.linalg.lstsq(design, whole).solution
    new = {n: solution.weights[f"blocks.2.mlp.narrow.{n}"].double() for n in ("weight", "bias")}
    old_bias = block.mlp.narrow.bias.detach().double()
    found = x[:, stays] @ new["weight"].T + new["bias"] - old_bias
    least, left = (whole - best).norm(), (whole - found).norm()
    assert least <= left <= 1.1 * least
    assert (
        left
        < 0.7 * (whole - x[:, stays] @ block.mlp.narrow.weight.detach().double()[:, stays].T).norm()
    )


def test_variance_based_pruning_keeps_the_mean_of_every_mlp(
    known: TracedImages, sizes: Sizes
) -> None:
    baseline = Baseline(Neurons(known), "vbp")
    plan = baseline.plan(sizes, "params", SHARE)
    solution = baseline.solution(plan)
    x, kept = neurons_of(known.model, 1), plan.narrowings[1].kept
    stays = sorted(x.var(0).topk(kept).indices.tolist())
    layer = known.model.blocks[1].mlp.narrow
    assert torch.equal(solution.weights["blocks.1.mlp.narrow.weight"], layer.weight[:, stays])
    before = (x.float() @ layer.weight.T + layer.bias).mean(0)
    new = x[:, stays].float() @ solution.weights["blocks.1.mlp.narrow.weight"].T
    after = (new + solution.weights["blocks.1.mlp.narrow.bias"]).mean(0)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_magnitude_looks_at_no_image(known: TracedImages, sizes: Sizes) -> None:
    baseline = Baseline(Neurons(known), "magnitude")
    plan = baseline.plan(sizes, "params", SHARE)
    solution = baseline.solution(plan)
    mlp, kept = known.model.blocks[4].mlp, plan.narrowings[4].kept
    norms = mlp.wide.weight.square().sum(1) + mlp.narrow.weight.square().sum(0)
    stays = sorted(norms.topk(kept).indices.tolist())
    assert torch.equal(solution.weights["blocks.4.mlp.narrow.weight"], mlp.narrow.weight[:, stays])
    assert torch.equal(solution.weights["blocks.4.mlp.narrow.bias"], mlp.narrow.bias)
    assert torch.equal(solution.weights["blocks.4.mlp.wide.bias"], mlp.wide.bias[stays])


def test_what_makes_up_for_more_loses_less(known: TracedImages, sizes: Sizes) -> None:
    neurons, losses = Neurons(known), {}
    for method in BASELINES:
        baseline = Baseline(neurons, method)
        solution = baseline.solution(baseline.plan(sizes, "params", SHARE))
        small = applied(known.model, known.blocks, solution)
        losses[method] = kl(known.model, small)
    assert losses["corp"] < losses["vbp"] < losses["magnitude"]


def test_states_that_are_not_kept_give_the_same(known: TracedImages, sizes: Sizes) -> None:
    model = small_vit(residual=1.0)
    check = untouched(model)
    tight = Baseline(Neurons(originals(model, limit_bytes=0)), "corp")
    plan = tight.plan(sizes, "params", SHARE)
    expected = Baseline(Neurons(known), "corp").solution(plan)
    found = tight.solution(plan)
    check()
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_with_the_reason(known: TracedImages, sizes: Sizes) -> None:
    baseline = Baseline(Neurons(known), "vbp")
    with pytest.raises(BlockfitError, match=r"cannot be reached: vbp cuts MLPs alone, .*% remains"):
        baseline.plan(sizes, "params", 0.2)
    assert baseline.plan(sizes, "params", 1.0) == Plan()
    with pytest.raises(BlockfitError, match="unknown baseline 'corb'; choose one of corp, vbp"):
        Baseline(Neurons(known), "corb")
    gated = originals(small_vit(block=GatedBlock))
    with pytest.raises(BlockfitError, match=r"the MLP of block 0 cannot be narrowed: .*; choose"):
        Baseline(Neurons(gated), "corp")


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_is_a_recipe_of_compress(method: str, tmp_path: Path) -> None:
    """Judged as it is on the fit images, returned as it is on all of them."""
    model, images = small_vit(residual=1.0), small_images(24)
    result = blockfit.compress(model, images, params="80%", recipe=method, final=0)
    left = result.report["parameters_after"] / result.report["parameters_before"]
    assert 0.78 < left <= 0.8  # a neuron of every MLP is 1.4%
    assert {cut.part for cut in result.plan.narrowings} == {"mlp"}
    assert len({cut.kept for cut in result.plan.narrowings}) == 1
    assert result.report["recipe"]["baseline"] == method
    every = Baseline(Neurons(TracedImages.of(model, result.blocks, images)), method)
    expected = applied(model, result.blocks, every.solution(result.plan))
    blockfit.save(result, tmp_path / "small")
    stored = blockfit.load(tmp_path / "small", model=small_vit())
    for small in (result.model, stored):
        torch.testing.assert_close(small(FIT), expected(FIT), rtol=1e-4, atol=1e-4)
    assert result.report["held_out"]["kl"] > 0


def test_a_session_shares_the_statistics_of_its_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Setting.of(small_vit(), small_images(24)), RECIPES["corp"])
    reach(session, Budget("params", 0.8))
    ran: list[int] = []
    monkeypatch.setattr(Neurons, "_read", lambda *args: ran.append(1))
    smaller = reach(session.with_recipe(RECIPES["vbp"]), Budget("flops", 0.7))
    assert not ran
    assert session.sizes.known_fraction(smaller.solution.plan, "flops") <= 0.7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"remove": 2}, "cannot be used with remove="),
        ({"spans": ["1:2"]}, "cannot be used with spans="),
        ({"max_kl": 0.1}, "cannot be used with max_kl="),
        ({"params": 0.8, "protect": [1]}, "leave protect= out"),
        ({"params": 0.8, "whole": [1]}, "leave whole= out"),
        ({"params": 0.8, "multiple_of": 8}, "leave multiple_of= out"),
        ({"params": 0.8, "map": "linear"}, "leave map= out"),
    ],
)
def test_what_a_baseline_has_no_place_for_is_refused_before_any_work(
    arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Setting, "of", lambda *args, **how: pytest.fail("work was done"))
    model = small_vit()
    with pytest.raises(BlockfitError, match=words):
        blockfit.compress(model, small_images(24), recipe="corp", **arguments)
    with pytest.raises(BlockfitError, match="cannot be used with a sweep"):
        blockfit.sweep(model, small_images(24), tmp_path / "sweep", recipe="corp")
    assert not (tmp_path / "sweep").exists()


def test_the_command_line_refuses_in_its_own_words(tmp_path: Path) -> None:
    end = ("--images", "nowhere", "-o", tmp_path / "small", "--recipe", "corp")
    refused = run("compress", "nowhere", *end, "--max-drop", "1")
    assert refused.code == 2
    assert "--params or --flops and cannot be used with --max-drop" in refused.error
    refused = run("compress", "nowhere", *end, "--params", "62%", "--protect", "1")
    assert "leave --protect out" in refused.error
    refused = run("sweep", "nowhere", *end)
    assert "recipe corp narrows all MLPs alike" in refused.error
